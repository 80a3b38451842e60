//! System calls that neither rustix nor nix wraps safely. Each module holds one family and its `unsafe`.

pub(crate) mod attr;
pub(crate) mod bpf;
pub(crate) mod clone;
pub(crate) mod descriptors;
pub(crate) mod keyring;
pub(crate) mod netif;
pub(crate) mod prctl;
pub(crate) mod scheduling;
pub(crate) mod seccomp;
pub(crate) mod signals;
pub(crate) mod socket;
pub(crate) mod tty;

/// The result of a raw system call: its value, or the error in `errno`.
fn check(result: libc::c_long) -> std::io::Result<libc::c_long> {
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(result) }
}
