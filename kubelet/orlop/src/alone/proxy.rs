//! `orlop proxy`, or the program called `kube-proxy`: the service proxy alone.
//!
//! As kube-proxy has it, a configuration file replaces the flags, but for the kubeconfig and the node's name.

use super::{client, host_name};
use crate::cli::ProxyArgs;
use crate::node::proxy::node_addresses;
use crate::node::{ready, stop_on_signals};
use anyhow::{Context, Result, bail};
use orlop_proxy::config::{node_port_addresses, parse_networks};
use orlop_proxy::{ConfigError, KubeProxyConfiguration, Proxy, ProxyConfig};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

/// Runs until told to stop; rules stay, so services go on.
pub async fn run(args: ProxyArgs) -> Result<()> {
    if args.version {
        println!("Kubernetes {}", orlop_kubelet::node::KUBELET_VERSION);
        return Ok(());
    }
    if args.cleanup {
        return Proxy::cleanup().context("remove the proxy's rules");
    }
    let request = Request::of(&args)?;
    for key in &request.without_effect {
        tracing::warn!(key, "this setting has no effect in this version");
    }
    let client = client(request.kubeconfig.as_deref())?;
    let shutdown = stop_on_signals()?;
    let addresses = match request.bind_address {
        Some(ip) => vec![ip],
        None => match shutdown.unless_triggered(node_addresses(&client, &request.template.node_name)).await {
            Some(addresses) => addresses,
            None => return Ok(()),
        },
    };
    ready("the service proxy");
    Proxy::run(client, ProxyConfig { node_ips: addresses, ..request.template }, shutdown.token()).await?;
    Ok(())
}

/// What the command line and the file come to.
#[derive(Debug)]
struct Request {
    kubeconfig: Option<PathBuf>,
    bind_address: Option<IpAddr>,
    /// All but the node's addresses.
    template: ProxyConfig,
    without_effect: Vec<String>,
}

impl Request {
    fn of(args: &ProxyArgs) -> Result<Self> {
        match &args.config {
            Some(file) => {
                let text = std::fs::read_to_string(file).with_context(|| {
                    format!("read the proxy's configuration {}: correct --config", file.display())
                })?;
                Self::of_file(args, &text).with_context(|| format!("configuration {}", file.display()))
            }
            None => Self::of_flags(args),
        }
    }

    fn of_file(args: &ProxyArgs, text: &str) -> Result<Self> {
        let file = KubeProxyConfiguration::parse(text)?;
        let node_name = args.hostname_override.clone().or_else(|| file.hostname_override.clone());
        Ok(Self {
            kubeconfig: args.kubeconfig.clone().or_else(|| file.kubeconfig.clone()),
            bind_address: file.bind_address,
            template: file.proxy_config(node_name.unwrap_or_else(host_name), Vec::new()),
            without_effect: file.without_effect.iter().map(|key| (*key).to_owned()).collect(),
        })
    }

    fn of_flags(args: &ProxyArgs) -> Result<Self> {
        if args.mode != "nftables" {
            return Err(ConfigError::Mode(args.mode.clone())).context("--mode");
        }
        if !matches!(args.detect_local_mode.as_str(), "" | "ClusterCIDR") {
            return Err(ConfigError::DetectLocal(args.detect_local_mode.clone()))
                .context("--detect-local-mode");
        }
        let template = ProxyConfig {
            node_name: args.hostname_override.clone().unwrap_or_else(host_name),
            cluster_cidr: parse_networks(
                "--cluster-cidr",
                args.cluster_cidr.iter().flat_map(|text| text.split(',')),
            )?,
            node_port_addresses: node_port_addresses(&args.nodeport_addresses)?,
            masquerade_all: args.masquerade_all,
            healthz: healthz(&args.healthz_bind_address)?,
            ..ProxyConfig::default()
        };
        Ok(Self {
            kubeconfig: args.kubeconfig.clone(),
            bind_address: args.bind_address.filter(|ip| !ip.is_unspecified()),
            template,
            without_effect: args.without_effect.given(),
        })
    }
}

/// An address and port, or nothing for no server.
fn healthz(text: &str) -> Result<Option<SocketAddr>> {
    if text.is_empty() {
        return Ok(None);
    }
    let Ok(address) = text.parse() else {
        bail!(
            "--healthz-bind-address {text:?}: must be an address and a port such as 0.0.0.0:10256, or empty"
        );
    };
    Ok(Some(address))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command, arguments};
    use clap::Parser;

    fn request(line: &str) -> Result<Request> {
        let line = arguments(line.split_whitespace().map(Into::into));
        let Command::Proxy(args) = Cli::try_parse_from(line)?.command else { bail!("another command") };
        Request::of(&args)
    }

    #[test]
    fn flags_of_kube_proxy_are_understood_under_its_name() -> Result<()> {
        let request = request(
            "/usr/bin/kube-proxy --kubeconfig=/k --hostname_override n1 --cluster-cidr 10.244.0.0/16,fd00::/56 \
             --proxy-mode=nftables --nodeport-addresses 10.0.0.0/8 --masquerade-all --v=2 --oom-score-adj -999",
        )?;
        assert_eq!(request.kubeconfig.as_deref().and_then(|path| path.to_str()), Some("/k"));
        assert_eq!(request.template.node_name, "n1");
        assert_eq!(request.template.cluster_cidr.len(), 2);
        assert!(request.template.masquerade_all);
        assert_eq!(request.template.healthz, Some("0.0.0.0:10256".parse()?));
        assert_eq!(request.without_effect, ["--v", "--oom-score-adj"]);
        Ok(())
    }

    #[test]
    fn other_modes_and_wrong_values_are_refused_with_a_remedy() {
        let refused = |line: &str, part: &str| {
            let message = format!("{:#}", request(line).unwrap_err());
            assert!(message.contains(part), "{message}");
        };
        refused("orlop proxy --mode iptables", "only nftables");
        refused("orlop proxy --cluster-cidr 10.0.0.0", "--cluster-cidr");
        refused("orlop proxy --healthz-bind-address here", "--healthz-bind-address");
        refused("orlop proxy --config /nonexistent.yaml", "/nonexistent.yaml");
    }

    #[test]
    fn a_file_replaces_the_flags_but_for_kubeconfig_and_name() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("proxy.yaml");
        std::fs::write(
            &file,
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nhostnameOverride: f\n\
             clusterCIDR: 10.1.0.0/16\nbindAddress: 192.0.2.7\nclientConnection: {kubeconfig: /file}\nportRange: ''\n",
        )?;
        let line = format!(
            "orlop proxy --config {} --hostname-override n --cluster-cidr 10.2.0.0/16",
            file.display()
        );
        let request = request(&line)?;
        assert_eq!(request.template.node_name, "n");
        assert_eq!(request.kubeconfig.as_deref().and_then(|path| path.to_str()), Some("/file"));
        assert_eq!(request.template.cluster_cidr, ["10.1.0.0/16".parse()?]);
        assert_eq!(request.bind_address, Some("192.0.2.7".parse()?));
        assert_eq!(request.without_effect, ["portRange"]);
        Ok(())
    }
}
