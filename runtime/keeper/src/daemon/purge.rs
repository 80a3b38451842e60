//! `--purge`: the end of a node. Kills and deletes every container of the state directory and removes what was made.

use super::{Config, DaemonError, socket, take_lock};
use crate::record::Store;
use orlop_oci::ContainerId;

pub(super) fn purge(config: &Config) -> Result<(), DaemonError> {
    if !config.state.exists() {
        return Ok(());
    }
    let store = Store::open(&config.state)?;
    // A running keeper would write its records again.
    let lock = take_lock(&store)?;
    let loaded = store.load()?;
    let damaged = loaded.errors.len();
    for error in &loaded.errors {
        tracing::error!(%error, "cannot purge");
    }
    let ids = loaded.records.into_iter().map(|record| record.id).chain(loaded.unfinished);
    let failed = ids.filter(|id| !purge_container(&store, id)).count() + damaged;
    if failed > 0 {
        return Err(DaemonError::Purge(failed));
    }
    socket::unlink(&config.socket);
    drop(lock);
    socket::unlink(&store.root().join("lock"));
    // Something of somebody else's in it is a reason to leave it.
    if let Err(error) = std::fs::remove_dir(store.root()) {
        tracing::warn!(%error, "left the state directory");
    }
    Ok(())
}

fn purge_container(store: &Store, id: &str) -> bool {
    let Ok(container) = ContainerId::new(id) else { return false };
    match orlop_oci::Container::load(&store.oci_root(id), &container) {
        Ok(oci) => {
            if let Err(error) = oci.delete(true) {
                tracing::error!(container = id, %error, "cannot delete");
                return false;
            }
        }
        Err(error) if error.is_not_exist() => {}
        Err(error) => {
            tracing::error!(container = id, %error, "cannot find what to delete");
            return false;
        }
    }
    match store.remove(id) {
        Ok(()) => true,
        Err(error) => {
            tracing::error!(%error, "cannot purge");
            false
        }
    }
}
