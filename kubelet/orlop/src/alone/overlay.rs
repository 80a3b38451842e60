//! `orlop overlay`: the overlay between nodes alone, in the place of flanneld.

use super::client;
use crate::cli::OverlayArgs;
use crate::node::{ready, stop_on_signals};
use anyhow::{Context, Result};
use orlop_overlay::{Config, NetConf, Overlay};

/// Runs until told to stop; device, routes and entries stay, so pods go on talking.
pub async fn run(args: OverlayArgs) -> Result<()> {
    let config = args.config()?;
    let client = client(args.kubeconfig.as_deref())?;
    let shutdown = stop_on_signals()?;
    let overlay = Overlay::new(config);
    let mut lease = overlay.lease();
    tokio::spawn(async move {
        // Ends without one when the overlay does.
        if lease.wait_for(Option::is_some).await.is_ok() {
            ready("the overlay");
        }
    });
    Box::pin(overlay.run(client, args.node_name, async move { shutdown.triggered().await })).await?;
    Ok(())
}

impl OverlayArgs {
    fn config(&self) -> Result<Config> {
        let path = self.net_conf.display();
        let text = std::fs::read_to_string(&self.net_conf).with_context(|| {
            format!("read the network configuration {path}: give another file with --net-conf")
        })?;
        let net_conf = NetConf::parse(&text).with_context(|| format!("network configuration {path}"))?;
        Ok(Config {
            public_ip: self.public_ip,
            iface: self.iface.clone(),
            subnet_file: self.subnet_file.clone(),
            ip_masq: self.ip_masq,
            ..Config::new(net_conf)
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::cli::{Cli, Command};
    use anyhow::{Result, bail};
    use clap::Parser;

    #[test]
    fn flags_and_net_conf_become_one_configuration() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("net-conf.json");
        std::fs::write(&file, r#"{"Network": "10.9.0.0/16", "Backend": {"Type": "vxlan", "VNI": 7}}"#)?;
        let net_conf = format!("--net-conf={}", file.display());
        let arguments =
            ["orlop", "overlay", "--node-name", "a", &net_conf, "--iface", "eth1", "--ip-masq=false"];
        let Command::Overlay(args) = Cli::try_parse_from(arguments)?.command else {
            bail!("another command")
        };
        let config = args.config()?;
        assert_eq!((config.net_conf.vni, config.iface.as_deref(), config.ip_masq), (7, Some("eth1"), false));

        std::fs::write(&file, r#"{"Network": "10.9.0.0/16", "Backend": {"Type": "udp"}}"#)?;
        let message = format!("{:#}", args.config().unwrap_err());
        assert!(message.contains("net-conf.json") && message.contains("udp"), "{message}");
        Ok(())
    }
}
