//! Waiting for something to become true, with a reason when it does not.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// An error that no waiting will mend, such as the death of the process waited for.
#[derive(Debug)]
pub struct Hopeless(pub String);

impl std::fmt::Display for Hopeless {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Hopeless {}

/// Calls `probe` until it answers `Ok`, at most for `limit`; the last refusal is part of the error.
pub fn until<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match probe() {
            Ok(value) => return Ok(value),
            Err(last) if start.elapsed() > limit || last.is::<Hopeless>() => {
                bail!("{what}: not within {limit:?}: {last:#}")
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}
