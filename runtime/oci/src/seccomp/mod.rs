//! Seccomp: the specification's rules compiled to classic BPF.

mod arch;
mod assemble;
mod compile;

pub(crate) use compile::{Compiled, compile};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("seccomp: action {0} is not supported yet")]
    Action(String),
    #[error("seccomp: syscall argument index {0} is out of range")]
    Argument(usize),
    #[error("seccomp: the filter has {0} instructions, more than the kernel's 4096")]
    TooLong(usize),
    #[error("seccomp: this machine's architecture has no syscall table here")]
    Architecture,
}
