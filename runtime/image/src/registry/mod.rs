//! The registry client: manifests and blobs over HTTP, with mirrors, authentication and resumption.
//!
//! Built on hyper directly. The agent already carries hyper, hyper-util and rustls for the API server and the CRI; a
//! client on reqwest or oci-client would bring a second HTTP stack, a second root store and their resident memory for
//! what is a few hundred lines here, and neither resumes broken downloads, uses client certificates per registry, nor
//! takes identity tokens.
//!
//! A [`Session`] lives for one pull. Tokens are cached in it per scope and die with it, so one pod's credentials can
//! never fetch an image for another; the hosts' configuration is read anew for each. HTTP/1.1 only: layers in parallel
//! get connections, hence windows, of their own.

pub(crate) mod auth;
mod blob;
pub(crate) mod hosts;
mod session;
mod token;
mod transport;

pub(crate) use blob::BlobStream;
pub(crate) use session::{Session, Timing};

#[cfg(test)]
mod tests;
