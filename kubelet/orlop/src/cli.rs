//! The command line.

use crate::log::LogFormat;
use clap::{ArgAction, Args, Parser, Subcommand};
use std::ffi::{OsStr, OsString};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// The worker side of Kubernetes in one program.
#[derive(Debug, Parser)]
#[command(name = "orlop", version, disable_help_subcommand = true)]
pub struct Cli {
    /// What to log: LEVEL, or LEVEL,PART=LEVEL with parts such as kubelet, cri, image, proxy, overlay
    #[arg(long, env = "ORLOP_LOG", default_value = "info", global = true, value_name = "FILTER")]
    pub log: String,
    /// How log lines look
    #[arg(long, value_enum, default_value = "text", global = true)]
    pub log_format: LogFormat,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the whole worker node in this process
    Node(NodeArgs),
    /// Run a standalone node with its keeper: static pods, no API server
    Up(UpArgs),
    /// Run the kubelet alone, on this program's own runtime or on any CRI endpoint
    Kubelet(KubeletArgs),
    /// Run the container runtime alone, as a CRI v1 service
    Cri(CriArgs),
    /// Run the service proxy alone
    Proxy(Box<ProxyArgs>),
    /// Run the overlay between nodes alone, as flanneld does
    Overlay(OverlayArgs),
    /// List containers
    Ps {
        /// Also those that have ended
        #[arg(short, long)]
        all: bool,
        #[command(flatten)]
        node: Endpoint,
    },
    /// List pods
    Pods {
        /// Also those whose sandbox is gone
        #[arg(short, long)]
        all: bool,
        #[command(flatten)]
        node: Endpoint,
    },
    /// Print a container's log
    Logs {
        #[command(flatten)]
        which: Which,
        /// Go on printing what is written
        #[arg(short, long)]
        follow: bool,
        /// Begin this many lines before the end
        #[arg(long, value_name = "LINES")]
        tail: Option<usize>,
        /// Print the time of each line
        #[arg(long)]
        timestamps: bool,
        #[command(flatten)]
        node: Endpoint,
    },
    /// Run a command in a container
    Exec {
        #[command(flatten)]
        which: Which,
        /// Pass standard input on
        #[arg(short = 'i', long)]
        stdin: bool,
        /// Give the command a terminal
        #[arg(short = 't', long)]
        tty: bool,
        /// The command and its arguments
        #[arg(last = true, required = true)]
        command: Vec<String>,
        #[command(flatten)]
        node: Endpoint,
    },
    /// List images
    Images {
        #[command(flatten)]
        node: Endpoint,
    },
    /// Pull an image
    Pull {
        image: String,
        #[command(flatten)]
        node: Endpoint,
    },
    /// Look this machine over: what the kernel offers, what is missing and what to do about it
    Check {
        /// The node's configuration
        #[arg(long, default_value = "/etc/orlop/config.yaml")]
        config: PathBuf,
    },
    /// Put the programs, the systemd units and a sample configuration in place
    Install {
        #[command(flatten)]
        places: PlaceArgs,
        /// Also enable and start the services
        #[arg(long)]
        start: bool,
    },
    /// Stop the node and take programs and units away
    Uninstall {
        #[command(flatten)]
        places: PlaceArgs,
        /// Also remove configuration, images and pod data
        #[arg(long)]
        purge: bool,
    },
    /// Remove every container, mount, interface, address and rule of this node; the agent must be stopped
    Purge {
        /// The node's configuration
        #[arg(long, default_value = "/etc/orlop/config.yaml")]
        config: PathBuf,
    },
    /// Answer requests: the program of the demo image
    #[command(hide = true)]
    Demo {
        #[arg(long, default_value_t = 8080)]
        port: u16,
    },
    /// Wait for signals: the process that holds a shared PID namespace
    #[command(hide = true)]
    Pause,
}

#[derive(Debug, Args)]
pub struct NodeArgs {
    /// The node's configuration
    #[arg(long, default_value = "/etc/orlop/config.yaml")]
    pub config: PathBuf,
    /// How the API server is reached
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
    /// Used to ask for the first certificate
    #[arg(long)]
    pub bootstrap_kubeconfig: Option<PathBuf>,
    /// The Node object's name
    #[arg(long, value_name = "NAME")]
    pub hostname_override: Option<String>,
    /// The address other nodes reach this one at
    #[arg(long)]
    pub node_ip: Option<IpAddr>,
}

#[derive(Debug, Args)]
pub struct UpArgs {
    /// Manifests of the pods to run, watched for changes [default: the configuration's, or /etc/orlop/manifests]
    #[arg(long, value_name = "DIR")]
    pub manifests: Option<PathBuf>,
    /// An OCI layout, a docker archive, or a folder of them to import first
    #[arg(long, value_name = "PATH")]
    pub images: Option<PathBuf>,
    /// A node configuration; the kubeconfig in it is ignored
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub struct KubeletArgs {
    /// The kubelet's own flags; `orlop kubelet --help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub flags: Vec<String>,
}

#[derive(Debug, Args)]
pub struct CriArgs {
    /// Where to serve
    #[arg(long, value_name = "URL", default_value = "unix:///run/orlop/cri.sock")]
    pub listen: String,
    /// Images, writable layers and records that outlive a reboot
    #[arg(long, value_name = "DIR", default_value = "/var/lib/orlop")]
    pub root: PathBuf,
    /// What does not
    #[arg(long, value_name = "DIR", default_value = "/run/orlop")]
    pub state: PathBuf,
    /// The keeper's socket
    #[arg(long, value_name = "PATH", default_value = "/run/orlop/keeper.sock")]
    pub keeper_socket: PathBuf,
    /// Where the cgroup v2 tree is mounted
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/cgroup")]
    pub cgroup_root: PathBuf,
    /// Conflists of CNI plugins; without one only pods on the host's network can run
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    pub cni_conf_dir: PathBuf,
    /// Programs of CNI plugins
    #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin")]
    pub cni_bin_dir: PathBuf,
    /// Folder of hosts.toml files, one folder per registry [default: /etc/containerd/certs.d]
    #[arg(long, value_name = "DIR")]
    pub registry_config_dir: Option<PathBuf>,
    /// OCI layouts and docker archives to import at the start
    #[arg(long, value_name = "DIR")]
    pub preload_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct ProxyArgs {
    /// A KubeProxyConfiguration; the other flags are then ignored, but for kubeconfig and node name
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// How the API server is reached; in a pod the pod's own account when absent
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The Node object's name [default: the host's name]
    #[arg(long, value_name = "NAME")]
    pub hostname_override: Option<String>,
    /// The pods' addresses, per family; others that use a cluster address are hidden behind the node's
    #[arg(long, value_name = "CIDR[,CIDR]")]
    pub cluster_cidr: Option<String>,
    /// How traffic is directed; only nftables is supported
    #[arg(long, alias = "proxy-mode", default_value = "nftables")]
    pub mode: String,
    /// The node's address [default: those in the Node object]
    #[arg(long, value_name = "IP")]
    pub bind_address: Option<IpAddr>,
    /// Networks of local addresses that answer node ports, or `primary` for the node's own addresses
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pub nodeport_addresses: Vec<String>,
    /// Hide every client of a cluster address behind the node's address
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = ArgAction::Set)]
    pub masquerade_all: bool,
    /// Where /healthz is served; empty: nowhere
    #[arg(long, value_name = "IP:PORT", default_value = "0.0.0.0:10256")]
    pub healthz_bind_address: String,
    /// How clients outside the cluster are told: only ClusterCIDR is supported
    #[arg(long, value_name = "MODE", default_value = "", hide = true)]
    pub detect_local_mode: String,
    /// Remove the proxy's rules and end
    #[arg(long)]
    pub cleanup: bool,
    /// Print the version of Kubernetes it stands for and end
    #[arg(long)]
    pub version: bool,
    #[command(flatten)]
    pub without_effect: ProxyFlagsWithoutEffect,
}

/// Flags that manifests of kube-proxy carry and that change nothing here.
#[derive(Debug, Default, Args)]
pub struct ProxyFlagsWithoutEffect {
    #[arg(short, long, hide = true)]
    v: Option<String>,
    #[arg(long, hide = true)]
    vmodule: Option<String>,
    #[arg(long, hide = true, allow_hyphen_values = true)]
    oom_score_adj: Option<String>,
    #[arg(long, hide = true)]
    metrics_bind_address: Option<String>,
    #[arg(long, hide = true)]
    feature_gates: Option<String>,
    #[arg(long, hide = true)]
    config_sync_period: Option<String>,
    #[arg(long, hide = true)]
    conntrack_max_per_core: Option<String>,
    #[arg(long, hide = true)]
    conntrack_min: Option<String>,
    #[arg(long, hide = true)]
    conntrack_tcp_timeout_established: Option<String>,
    #[arg(long, hide = true)]
    conntrack_tcp_timeout_close_wait: Option<String>,
    #[arg(long, hide = true)]
    kube_api_qps: Option<String>,
    #[arg(long, hide = true)]
    kube_api_burst: Option<String>,
    #[arg(long, hide = true)]
    logging_format: Option<String>,
}

impl ProxyFlagsWithoutEffect {
    /// Those on the command line, as they are written there.
    pub fn given(&self) -> Vec<String> {
        let all = [
            ("--v", &self.v),
            ("--vmodule", &self.vmodule),
            ("--oom-score-adj", &self.oom_score_adj),
            ("--metrics-bind-address", &self.metrics_bind_address),
            ("--feature-gates", &self.feature_gates),
            ("--config-sync-period", &self.config_sync_period),
            ("--conntrack-max-per-core", &self.conntrack_max_per_core),
            ("--conntrack-min", &self.conntrack_min),
            ("--conntrack-tcp-timeout-established", &self.conntrack_tcp_timeout_established),
            ("--conntrack-tcp-timeout-close-wait", &self.conntrack_tcp_timeout_close_wait),
            ("--kube-api-qps", &self.kube_api_qps),
            ("--kube-api-burst", &self.kube_api_burst),
            ("--logging-format", &self.logging_format),
        ];
        all.into_iter().filter(|(_, value)| value.is_some()).map(|(name, _)| name.to_owned()).collect()
    }
}

#[derive(Debug, Args)]
pub struct OverlayArgs {
    /// How the API server is reached; in a pod the pod's own account when absent
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The Node object's name
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node_name: String,
    /// flannel's net-conf.json
    #[arg(long, value_name = "FILE", default_value = "/etc/kube-flannel/net-conf.json")]
    pub net_conf: PathBuf,
    /// The address peers reach this node at [default: the interface's]
    #[arg(long, value_name = "IP")]
    pub public_ip: Option<IpAddr>,
    /// The interface that carries the overlay [default: the default route's]
    #[arg(long, value_name = "NAME")]
    pub iface: Option<String>,
    /// Hide pods behind the node's address when they leave the cluster
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true", action = ArgAction::Set)]
    pub ip_masq: bool,
    /// Where CNI plugins read the node's subnet
    #[arg(long, value_name = "FILE", default_value = "/run/flannel/subnet.env")]
    pub subnet_file: PathBuf,
}

/// The command line as it is meant: the names `kubelet` and `kube-proxy` stand for the commands, and to these two `_`
/// is as good as `-` in a flag.
pub fn arguments(given: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut given = given.peekable();
    let program = given.next().unwrap_or_else(|| "orlop".into());
    let command = match Path::new(&program).file_name().and_then(OsStr::to_str) {
        Some("kubelet") => Some("kubelet"),
        Some("kube-proxy") => Some("proxy"),
        _ => None,
    };
    let mut all = vec![program];
    all.extend(command.map(OsString::from));
    let proxy = command == Some("proxy") || given.peek().is_some_and(|first| first == "proxy");
    all.extend(given.map(|argument| if proxy { with_dashes(argument) } else { argument }));
    all
}

fn with_dashes(argument: OsString) -> OsString {
    let Some(flag) = argument.to_str().filter(|text| text.starts_with("--")) else { return argument };
    match flag.split_once('=') {
        Some((name, value)) => format!("{}={value}", name.replace('_', "-")).into(),
        None => flag.replace('_', "-").into(),
    }
}

/// Which runtime a command talks to.
#[derive(Debug, Args)]
pub struct Endpoint {
    /// The runtime's socket
    #[arg(long, env = "ORLOP_ENDPOINT", default_value = "unix:///run/orlop/cri.sock")]
    pub endpoint: String,
}

/// Which container a command means.
#[derive(Debug, Args)]
pub struct Which {
    /// A pod's name, or the beginning of a container's id
    pub name: String,
    /// The container, where the pod has several
    #[arg(short, long)]
    pub container: Option<String>,
    /// The pod's namespace, where pods share a name
    #[arg(short, long)]
    pub namespace: Option<String>,
}

#[derive(Debug, Args)]
pub struct PlaceArgs {
    /// Put before every path: the root of another system's image
    #[arg(long, default_value = "/")]
    pub root: PathBuf,
    /// Folder of programs
    #[arg(long, default_value = "/usr/local/bin")]
    pub bin_dir: PathBuf,
    /// Folder of the configuration
    #[arg(long, default_value = "/etc/orlop")]
    pub config_dir: PathBuf,
    /// Folder of systemd units
    #[arg(long, default_value = "/etc/systemd/system")]
    pub unit_dir: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn line(text: &str) -> Vec<String> {
        let all = arguments(text.split_whitespace().map(Into::into));
        all.into_iter().map(|argument| argument.into_string().unwrap()).collect()
    }

    #[test]
    fn the_command_line_hangs_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_names_of_other_programs_stand_for_commands() {
        assert_eq!(line("/usr/bin/kubelet --v=2"), ["/usr/bin/kubelet", "kubelet", "--v=2"]);
        assert_eq!(line("kube-proxy --proxy_mode=a_b"), ["kube-proxy", "proxy", "--proxy-mode=a_b"]);
        assert_eq!(line("orlop proxy --cluster_cidr x_y"), ["orlop", "proxy", "--cluster-cidr", "x_y"]);
        assert_eq!(line("orlop logs my_pod --a_b"), ["orlop", "logs", "my_pod", "--a_b"]);
    }

    #[test]
    fn what_follows_kubelet_is_left_to_its_own_parser() {
        for text in
            ["kubelet --help", "orlop kubelet --version", "orlop kubelet --log debug --kubeconfig /k -v 4"]
        {
            let Ok(Cli { command: Command::Kubelet(args), .. }) = Cli::try_parse_from(line(text)) else {
                panic!("{text}")
            };
            assert!(!args.flags.is_empty() || text.contains("--log"), "{text}: {:?}", args.flags);
        }
    }
}
