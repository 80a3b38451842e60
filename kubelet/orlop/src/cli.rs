//! The command line.

use crate::log::LogFormat;
use clap::{Args, Parser, Subcommand};
use std::net::IpAddr;
use std::path::PathBuf;

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
    Proxy(ProxyArgs),
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
    /// Manifests of the pods to run, watched for changes
    #[arg(long, default_value = "/etc/orlop/manifests")]
    pub manifests: PathBuf,
    /// OCI layouts and docker archives to import first
    #[arg(long)]
    pub images: Option<PathBuf>,
    /// A node configuration; the kubeconfig in it is ignored
    #[arg(long)]
    pub config: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct KubeletArgs {
    /// The kubelet's own flags; `orlop kubelet --help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub flags: Vec<String>,
}

#[derive(Debug, Args)]
pub struct CriArgs {
    /// Where to serve
    #[arg(long, default_value = "unix:///run/orlop/cri.sock")]
    pub listen: String,
    /// Images, writable layers and records that outlive a reboot
    #[arg(long, default_value = "/var/lib/orlop")]
    pub root: PathBuf,
    /// What does not
    #[arg(long, default_value = "/run/orlop")]
    pub state: PathBuf,
    /// The keeper's socket
    #[arg(long, default_value = "/run/orlop/keeper.sock")]
    pub keeper_socket: PathBuf,
    /// Where the cgroup v2 tree is mounted
    #[arg(long, default_value = "/sys/fs/cgroup")]
    pub cgroup_root: PathBuf,
    /// Conflists of CNI plugins
    #[arg(long, default_value = "/etc/cni/net.d")]
    pub cni_conf_dir: PathBuf,
    /// Programs of CNI plugins
    #[arg(long, default_value = "/opt/cni/bin")]
    pub cni_bin_dir: PathBuf,
    /// Folder of hosts.toml files
    #[arg(long)]
    pub registry_config_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct ProxyArgs {
    /// A KubeProxyConfiguration; the other flags are then ignored, but for the host name
    #[arg(long)]
    pub config: Option<PathBuf>,
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
    /// The Node object's name
    #[arg(long, value_name = "NAME")]
    pub hostname_override: Option<String>,
    /// The pods' addresses
    #[arg(long)]
    pub cluster_cidr: Option<String>,
    /// How traffic is directed
    #[arg(long, default_value = "nftables", value_parser = ["nftables", "iptables"])]
    pub mode: String,
}

#[derive(Debug, Args)]
pub struct OverlayArgs {
    #[arg(long)]
    pub kubeconfig: PathBuf,
    /// The Node object's name
    #[arg(long)]
    pub node_name: String,
    /// flannel's net-conf.json
    #[arg(long, default_value = "/etc/kube-flannel/net-conf.json")]
    pub net_conf: PathBuf,
    /// The address peers reach this node at
    #[arg(long)]
    pub public_ip: Option<IpAddr>,
    /// Where CNI plugins read the node's subnet
    #[arg(long, default_value = "/run/flannel/subnet.env")]
    pub subnet_file: PathBuf,
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
