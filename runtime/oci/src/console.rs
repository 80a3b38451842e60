//! The container's terminal.

use crate::inroot::{Make, Root};
use crate::mounts::apply::{attach, clone_tree};
use crate::syscall::tty;
use rustix::fs::{AtFlags, FileType, OFlags};
use rustix::process::{Gid, Uid};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("allocate a terminal: {step}")]
    Allocate { step: &'static str, source: io::Error },
    #[error("allocate a terminal: /dev/pts/ptmx of the container is not a terminal multiplexer")]
    NotPtmx,
}

/// Both ends of a new terminal.
#[derive(Debug)]
pub(crate) struct Terminal {
    pub(crate) master: OwnedFd,
    pub(crate) slave: OwnedFd,
}

const DEVPTS_MAGIC: u64 = 0x1cd1;

/// Allocates a terminal in the devpts of `root`. What the image put there is not trusted: the node must be the
/// multiplexer of a devpts, and the other end is asked for by ioctl, not by name.
pub(crate) fn allocate(root: &Root, size: Option<(u64, u64)>, uid: u32) -> Result<Terminal, Error> {
    let fail = |step| move |source: io::Error| Error::Allocate { step, source };
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK;
    let master = root.open_at(Path::new("/dev/pts/ptmx"), flags).map_err(fail("open /dev/pts/ptmx"))?;
    let stat = rustix::fs::fstat(&master).map_err(|errno| fail("look at ptmx")(errno.into()))?;
    let number = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    let magic = crate::inroot::fs_magic(&master).map_err(fail("look at ptmx"))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice
        || number != (5, 2)
        || magic != DEVPTS_MAGIC
    {
        return Err(Error::NotPtmx);
    }
    rustix::fs::fcntl_setfl(&master, OFlags::empty())
        .map_err(|errno| fail("make it blocking")(errno.into()))?;
    rustix::pty::unlockpt(&master).map_err(|errno| fail("unlock it")(errno.into()))?;
    let slave = rustix::pty::ioctl_tiocgptpeer(
        &master,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )
    .map_err(|errno| fail("open the other end")(errno.into()))?;
    if let Some((height, width)) = size.filter(|(height, width)| *height > 0 || *width > 0) {
        let clamp = |value: u64| u16::try_from(value).unwrap_or(u16::MAX);
        let size = Winsize { ws_row: clamp(height), ws_col: clamp(width), ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&master, size).map_err(|errno| fail("set its size")(errno.into()))?;
    }
    rustix::fs::fchown(&slave, Some(Uid::from_raw(uid)), None::<Gid>)
        .map_err(|errno| fail("give it to the user")(errno.into()))?;
    Ok(Terminal { master, slave })
}

/// Shows the terminal as /dev/console too.
pub(crate) fn bind_console(root: &Root, slave: &OwnedFd) -> Result<(), Error> {
    let place = root
        .resolve_or_make(Path::new("/dev/console"), Make::File, 0o755)
        .map_err(|source| Error::Allocate { step: "make /dev/console", source })?;
    clone_tree(slave, false)
        .and_then(|copy| attach(copy, &place))
        .map_err(|source| Error::Allocate { step: "bind /dev/console", source })
}

/// Makes it the controlling terminal and the standard streams of this process.
pub(crate) fn adopt(slave: OwnedFd) -> Result<(), Error> {
    let fail = |source| Error::Allocate { step: "make it the controlling terminal", source };
    tty::set_controlling(&slave).map_err(fail)?;
    set_stdio(&[&slave, &slave, &slave]).map_err(fail)
}

/// Duplicates three descriptors onto 0, 1 and 2.
pub(crate) fn set_stdio(fds: &[&OwnedFd; 3]) -> io::Result<()> {
    // A source that is itself 0, 1 or 2 (the caller was started without standard streams) must not be overwritten
    // before it is used.
    let mut high = Vec::new();
    for fd in fds {
        high.push(rustix::io::fcntl_dupfd_cloexec(fd, 3)?);
    }
    let [stdin, stdout, stderr] = &high[..] else { return Ok(()) };
    rustix::stdio::dup2_stdin(stdin)?;
    rustix::stdio::dup2_stdout(stdout)?;
    rustix::stdio::dup2_stderr(stderr)?;
    Ok(())
}

/// Gives the standard streams to the user the process runs as, so that it can open /dev/stdout. Shared devices such as
/// the null device keep their owner.
pub(crate) fn give_stdio(uid: u32) {
    let give = |fd: std::os::fd::BorrowedFd<'_>| -> rustix::io::Result<()> {
        let stat = rustix::fs::fstat(fd)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let ours = matches!(kind, FileType::Fifo | FileType::Socket)
            || (kind == FileType::CharacterDevice && rustix::termios::isatty(fd));
        if ours && stat.st_uid != uid {
            rustix::fs::chownat(fd, "", Some(Uid::from_raw(uid)), None::<Gid>, AtFlags::EMPTY_PATH)?;
        }
        Ok(())
    };
    for fd in [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()] {
        // A stream that is closed, or on a file system that refuses, is left as it is.
        let _ = give(fd.as_fd());
    }
}
