//! `clone3` used as a fork, and ending the child.
#![allow(unsafe_code)]

use super::check;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Not in libc for every target; the value is the kernel's ABI (linux/sched.h, since 5.7).
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `struct clone_args` of linux/sched.h, version 2 (with `cgroup`, since 5.7).
#[repr(C, align(8))]
#[derive(Debug, Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

#[derive(Debug)]
pub(crate) enum Forked {
    Child,
    Parent { pid: u32, pidfd: OwnedFd },
}

/// Forks with new namespaces, into a cgroup when one is given. With `sibling` the child's parent is the caller's parent.
///
/// The caller must be single-threaded: the child goes on with ordinary code, and a lock held by another thread at the
/// fork (the allocator's, for one) would never be released in it.
pub(crate) fn fork(namespaces: u64, cgroup: Option<BorrowedFd<'_>>, sibling: bool) -> io::Result<Forked> {
    let mut pidfd: RawFd = -1;
    let mut args = CloneArgs {
        flags: namespaces | libc::CLONE_PIDFD.unsigned_abs() as u64,
        pidfd: &raw mut pidfd as u64,
        exit_signal: libc::SIGCHLD.unsigned_abs().into(),
        ..CloneArgs::default()
    };
    if sibling {
        // The exit signal is inherited from the caller then and must not be given.
        args.flags |= u64::from(libc::CLONE_PARENT.unsigned_abs());
        args.exit_signal = 0;
    }
    if let Some(dir) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(dir.as_raw_fd().unsigned_abs());
    }
    // Born not dumpable: from the first moment in a container's PID namespace nobody in it may look at the descriptors
    // and the memory that the child has from this process.
    let dumpable = rustix::process::dumpable_behavior();
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    // SAFETY: `args` is a valid clone_args of the size given and lives across the call; `pidfd` is where the kernel
    // stores a descriptor. No CLONE_VM and no stack: the child gets a copy of this address space, as after fork.
    let forked = check(unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) });
    if matches!(forked, Ok(0)) {
        return Ok(Forked::Child);
    }
    if let Ok(before) = dumpable {
        let _ = rustix::process::set_dumpable_behavior(before);
    }
    let pid = forked?;
    // SAFETY: the kernel has just stored a descriptor in `pidfd` that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Forked::Parent { pid: u32::try_from(pid).unwrap_or_default(), pidfd })
}

/// Ends the process without running destructors or exit handlers, which belong to the process it was forked from.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Executes a program from a descriptor (`AT_EMPTY_PATH`).
pub(crate) fn exec_fd(
    program: BorrowedFd<'_>,
    args: &[std::ffi::CString],
    env: &[std::ffi::CString],
) -> io::Error {
    let pointers = |strings: &[std::ffi::CString]| {
        strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect::<Vec<_>>()
    };
    let (argv, envp) = (pointers(args), pointers(env));
    // SAFETY: argv and envp are null-terminated arrays of pointers to C strings that outlive the call.
    let _ = unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            envp.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    io::Error::last_os_error()
}
