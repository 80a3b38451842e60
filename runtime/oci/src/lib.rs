//! OCI runtime: library and the command line of runc.
