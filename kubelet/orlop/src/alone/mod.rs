//! The parts of the worker one by one, behind the command lines of the programs they stand in for.

pub mod cri;
pub mod kubelet;
pub mod overlay;
pub mod proxy;

use anyhow::{Context, Result};
use orlop_api::{Client, ServerConfig};
use std::path::Path;

/// The API server of a kubeconfig, or of the cluster around a pod.
fn client(kubeconfig: Option<&Path>) -> Result<Client> {
    match kubeconfig {
        Some(file) => Ok(Client::from_kubeconfig(file)?),
        None => {
            let config = ServerConfig::in_cluster()
                .context("no --kubeconfig, and this is no pod with an account for the API server")?;
            Ok(Client::new(config)?)
        }
    }
}

/// The Node object's name when nobody gives one.
fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().trim().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_kubeconfig_and_outside_of_a_pod_the_remedy_is_told() {
        let message = format!("{:#}", client(None).unwrap_err());
        assert!(message.contains("--kubeconfig"), "{message}");
        let message = format!("{:#}", client(Some(Path::new("/nonexistent/kubeconfig"))).unwrap_err());
        assert!(message.contains("/nonexistent/kubeconfig"), "{message}");
    }
}
