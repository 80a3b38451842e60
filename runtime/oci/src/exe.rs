//! Keeps the runtime's own executable out of every container's reach.
//!
//! A process entering a container still is the runtime until it executes the user's program, and a hostile image can
//! name `/proc/self/exe` (or a script with that interpreter) as its program: the process is then dumpable, runs the
//! host's file, and others in the container may open it through `/proc/<pid>/exe` and, once it has ended, for writing.
//! So the runtime executes itself again from a place where the file cannot be written: a detached read-only mount of
//! it, which nobody can remount because it is in no mount namespace; or, where mounting is not permitted, a sealed
//! copy in memory.

use crate::Error;
use crate::syscall::{attr, clone::exec_fd};
use rustix::fs::{CWD, MemfdFlags, OFlags, SealFlags};
use rustix::mount::OpenTreeFlags;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// Names the executable as it was called, for a program that wants to start itself anew.
const ORIGIN: &str = "_ORLOP_EXE";

/// Call first in `main` of every program that creates containers. Unless the running executable already lies on
/// something read-only, replaces the process by itself, executed from where it cannot be written.
pub fn protect() -> Result<(), Error> {
    let own = File::open("/proc/self/exe").map_err(Error::system("open /proc/self/exe"))?;
    if is_protected(&own) {
        // The kernel names the process after the descriptor it was executed from, before 6.14.
        let _ = rustix::thread::set_name(&program_name());
        return Ok(());
    }
    let copy = read_only_mount().or_else(|_| sealed_copy(own));
    let copy = copy.map_err(Error::system("make a read-only copy of the runtime's executable"))?;
    let args = std::env::args_os().filter_map(|arg| CString::new(arg.into_vec()).ok()).collect::<Vec<_>>();
    let mut env = std::env::vars_os()
        .filter(|(key, _)| key != ORIGIN)
        .filter_map(|(key, value)| CString::new([key.into_vec(), value.into_vec()].join(&b'=')).ok())
        .collect::<Vec<_>>();
    if let Some(origin) =
        std::fs::read_link("/proc/self/exe").ok().and_then(|path| path.into_os_string().into_string().ok())
        && let Ok(entry) = CString::new(format!("{ORIGIN}={origin}"))
    {
        env.push(entry);
    }
    let error = exec_fd(copy.as_fd(), &args, &env);
    Err(Error::System { step: "execute the read-only copy of the runtime", source: error })
}

/// The path of the executable on disk, which `/proc/self/exe` no longer names after [`protect`].
pub fn original_path() -> Option<PathBuf> {
    std::env::var_os(ORIGIN).map(PathBuf::from).or_else(|| std::fs::read_link("/proc/self/exe").ok())
}

fn program_name() -> CString {
    let name = original_path().and_then(|path| path.file_name().map(|name| name.to_owned().into_vec()));
    CString::new(name.unwrap_or_default()).unwrap_or_default()
}

fn is_protected(own: &File) -> bool {
    let read_only = rustix::fs::fstatvfs(own)
        .is_ok_and(|found| found.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY));
    let sealed = rustix::fs::fcntl_get_seals(own).is_ok_and(|seals| seals.contains(SealFlags::WRITE));
    read_only || sealed
}

fn read_only_mount() -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mount = rustix::mount::open_tree(CWD, "/proc/self/exe", flags)?;
    attr::set(&mount, false, attr::RDONLY, 0)?;
    Ok(mount)
}

fn sealed_copy(mut own: File) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut copy = File::from(rustix::fs::memfd_create("orlop-oci", flags)?);
    io::copy(&mut own, &mut copy)?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&copy, seals)?;
    // Executing what is open for writing fails with ETXTBSY; reopen it for reading.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&copy));
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, rustix::fs::Mode::empty())?)
}
