//! Keeps the runtime's own executable out of every container's reach.

use crate::Error;

/// Call first in `main` of every program that creates containers. Unless the running executable already lies on
/// something read-only, replaces the process by itself executed from a read-only detached mount (or a sealed copy in
/// memory), so that `/proc/<pid>/exe` of a process entering a container is no way to overwrite the host's file.
pub fn protect() -> Result<(), Error> {
    todo!()
}
