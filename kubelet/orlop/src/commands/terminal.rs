//! The terminal this program runs at: raw while a remote one is shown on it, and its size.

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// A terminal that hands every key on as it is. Dropping this puts it back as it was.
#[derive(Debug)]
pub(crate) struct RawTerminal {
    terminal: OwnedFd,
    before: Termios,
}

impl RawTerminal {
    /// None when `input` is no terminal.
    pub(crate) fn enter(input: impl AsFd) -> Result<Option<Self>> {
        if !rustix::termios::isatty(&input) {
            return Ok(None);
        }
        let terminal = input.as_fd().try_clone_to_owned().context("keep the terminal's descriptor")?;
        let before = tcgetattr(&terminal).context("read the terminal's settings")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&terminal, OptionalActions::Now, &raw).context("make the terminal raw")?;
        Ok(Some(Self { terminal, before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // After the output, so that its last bytes are still shown raw. A terminal that is gone needs no settings.
        let _gone = tcsetattr(&self.terminal, OptionalActions::Drain, &self.before);
    }
}

/// Columns and rows of the terminal, now and whenever they change. Silent when there is no terminal.
pub(crate) fn sizes() -> Result<mpsc::Receiver<(u16, u16)>> {
    let mut changes = signal(SignalKind::window_change()).context("watch the terminal's size")?;
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(async move {
        loop {
            if let Some(size) = size()
                && sender.send(size).await.is_err()
            {
                return;
            }
            if changes.recv().await.is_none() {
                return;
            }
        }
    });
    Ok(receiver)
}

/// Whichever standard stream is the terminal knows; a size of zero means that it does not.
fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(io::stdout())
        .or_else(|_| tcgetwinsize(io::stdin()))
        .or_else(|_| tcgetwinsize(io::stderr()))
        .ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    use rustix::termios::LocalModes;

    #[test]
    fn a_raw_terminal_is_put_back_as_it_was() -> Result<()> {
        let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        grantpt(&controller)?;
        unlockpt(&controller)?;
        let terminal = ioctl_tiocgptpeer(&controller, OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        let modes = || tcgetattr(&terminal).map(|settings| settings.local_modes);
        let before = modes()?;
        assert!(before.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));
        let raw = RawTerminal::enter(&terminal)?;
        assert!(!modes()?.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));
        drop(raw);
        assert_eq!(modes()?, before);
        Ok(())
    }

    #[test]
    fn what_is_no_terminal_is_left_alone() -> Result<()> {
        assert!(RawTerminal::enter(std::fs::File::open("/dev/null")?)?.is_none());
        Ok(())
    }
}
