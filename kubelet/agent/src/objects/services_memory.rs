//! The Services as last known, on disk: a container that is restarted while the API server is away gets the variables it
//! would have got before.

use crate::objects::services::{Known, ServiceFacts, ServicePort};
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::watch;

const VERSION: u32 = 1;
/// Changes within this time are written down together.
const GATHER: Duration = Duration::from_secs(5);

#[derive(Serialize, Deserialize)]
struct File {
    version: u32,
    services: Vec<Remembered>,
}

#[derive(Serialize, Deserialize)]
struct Remembered {
    namespace: String,
    name: String,
    cluster_ip: Option<IpAddr>,
    ports: Vec<ServicePort>,
}

/// None when nothing was written, or nothing that can be understood.
pub(super) fn load(path: &Path) -> Option<Vec<ServiceFacts>> {
    let file: File = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    let facts = |one: Remembered| ServiceFacts {
        namespace: one.namespace,
        name: one.name,
        cluster_ip: one.cluster_ip,
        ports: one.ports,
    };
    (file.version == VERSION).then(|| file.services.into_iter().map(facts).collect())
}

fn save(path: &Path, services: &[ServiceFacts]) -> io::Result<()> {
    let remembered = |one: &ServiceFacts| Remembered {
        namespace: one.namespace.clone(),
        name: one.name.clone(),
        cluster_ip: one.cluster_ip,
        ports: one.ports.clone(),
    };
    let file = File { version: VERSION, services: services.iter().map(remembered).collect() };
    let bytes = serde_json::to_vec(&file)?;
    if std::fs::read(path).is_ok_and(|known| known == bytes) {
        return Ok(());
    }
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let temporary = path.with_extension("json.new");
    let mut out = std::fs::File::create(&temporary)?;
    out.write_all(&bytes)?;
    out.sync_all()?;
    std::fs::rename(&temporary, path)
}

/// Writes down what is known, again and again, until nobody tells any more.
pub(super) async fn keep(path: PathBuf, mut known: watch::Receiver<Known>) {
    while known.changed().await.is_ok() {
        tokio::time::sleep(GATHER).await;
        let Some(services) = known.borrow_and_update().clone() else { continue };
        let work = {
            let path = path.clone();
            tokio::task::spawn_blocking(move || save(&path, &services))
        };
        if let Ok(Err(error)) = work.await {
            tracing::warn!(path = %path.display(), %error, "Services not written down: containers restarted without the API server would wait for it");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_read_back_and_a_torn_file_is_no_memory() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("deep/services.json");
        let port = ServicePort { name: "http".into(), port: 80, protocol: "TCP".into() };
        let service = ServiceFacts {
            namespace: "n".into(),
            name: "s".into(),
            cluster_ip: Some("10.0.0.1".parse().unwrap()),
            ports: vec![port],
        };
        assert_eq!(load(&path), None);
        save(&path, std::slice::from_ref(&service)).unwrap();
        assert_eq!(load(&path), Some(vec![service]));
        std::fs::write(&path, "{").unwrap();
        assert_eq!(load(&path), None);
    }
}
