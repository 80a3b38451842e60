//! The kubelet's command line, by the rules its users are used to: `--flag value` or `--flag=value`, switches alone or
//! with `=true` and `=false`, `_` as good as `-`, the last one wins.

use crate::config::RuntimeSection;
use crate::log::LogFormat;
use clap::ValueEnum;
use orlop_kubelet::config::{ConfigErrors, KubeletFlags};
use std::fmt::Write as _;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum FlagError {
    #[error("unknown flag {0}: see --help")]
    Unknown(String),
    #[error("unexpected argument {0:?}: the kubelet takes flags only")]
    Argument(String),
    #[error("--{0} needs a value")]
    NoValue(String),
    #[error("--{flag} {value:?}: {problem}")]
    Value { flag: String, value: String, problem: &'static str },
    #[error(transparent)]
    Override(#[from] ConfigErrors),
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Invocation {
    Help,
    Version,
    Run(Box<Invoked>),
}

/// A kubelet that is to run.
#[derive(Debug, Default)]
pub struct Invoked {
    pub flags: KubeletFlags,
    pub config_dir: Option<PathBuf>,
    /// Of the runtime in this process.
    pub runtime: RuntimeSection,
    pub cni_conf_dir: Option<PathBuf>,
    /// A log filter.
    pub log: Option<String>,
    pub log_format: Option<LogFormat>,
    pub without_effect: Vec<String>,
}

type Take = fn(&mut Invoked, &str) -> Result<(), &'static str>;

/// A flag that is no key of the file.
struct Flag {
    name: &'static str,
    /// What stands for its value in the help; empty for a switch.
    value: &'static str,
    help: &'static str,
    take: Take,
}

const fn flag(name: &'static str, value: &'static str, help: &'static str, take: Take) -> Flag {
    Flag { name, value, help, take }
}

/// The kubelet's flags beside the keys of its file.
const KUBELET: &[Flag] = &[
    flag("config", "FILE", "a KubeletConfiguration (kubelet.config.k8s.io/v1beta1)", |k, v| {
        k.flags.config = path(v);
        Ok(())
    }),
    flag("config-dir", "DIR", "folder of *.conf files laid over it, in the order of their names", |k, v| {
        k.config_dir = path(v);
        Ok(())
    }),
    flag(
        "kubeconfig",
        "FILE",
        "how the API server is reached; absent: standalone, only static pods run",
        |k, v| {
            k.flags.kubeconfig = path(v);
            Ok(())
        },
    ),
    flag(
        "bootstrap-kubeconfig",
        "FILE",
        "used to ask for the first certificate; the kubeconfig is written then",
        |k, v| {
            k.flags.bootstrap_kubeconfig = path(v);
            Ok(())
        },
    ),
    flag("hostname-override", "NAME", "the Node object's name (the host's name)", |k, v| {
        k.flags.hostname_override = text(v);
        Ok(())
    }),
    flag("node-ip", "IP[,IP]", "the node's address, or one of each family (the default route's)", |k, v| {
        k.flags.node_ip = text(v);
        Ok(())
    }),
    flag("node-labels", "K=V,…", "labels of the Node object when it is registered", |k, v| {
        let before = k.flags.node_labels.take();
        k.flags.node_labels = Some(before.map_or_else(|| v.to_owned(), |before| format!("{before},{v}")));
        Ok(())
    }),
    flag("register-node", "", "create the Node object (true)", |k, v| {
        k.flags.register_node = Some(v.parse().map_err(|_| SWITCH)?);
        Ok(())
    }),
    flag("root-dir", "DIR", "the kubelet's files (/var/lib/kubelet)", |k, v| {
        k.flags.root_dir = path(v);
        Ok(())
    }),
    flag("cert-dir", "DIR", "certificates (pki in the root folder)", |k, v| {
        k.flags.cert_dir = path(v);
        Ok(())
    }),
    flag("cloud-provider", "NAME", "must be empty: there is no cloud provider in this kubelet", |_, v| {
        if v.is_empty() { Ok(()) } else { Err("cloud providers are not supported, leave the flag out") }
    }),
    flag("logging-format", "FORMAT", "text or json", |k, v| {
        k.log_format = Some(match v {
            "text" => LogFormat::Text,
            "json" => LogFormat::Json,
            _ => return Err("must be text or json"),
        });
        Ok(())
    }),
    flag("v", "LEVEL", "how much is logged: 4 and more for debugging, 7 and more for everything", |k, v| {
        let level: u32 = v.parse().map_err(|_| "must be a whole number")?;
        k.log = match level {
            0..=3 => k.log.take(),
            4..=6 => Some("debug".to_owned()),
            _ => Some("trace".to_owned()),
        };
        Ok(())
    }),
];

/// Flags of ours: the runtime in this process, and the log.
const OURS: &[Flag] = &[
    flag("keeper-socket", "PATH", "the keeper's socket (/run/orlop/keeper.sock)", |k, v| {
        k.runtime.keeper_socket = v.into();
        Ok(())
    }),
    flag(
        "runtime-root",
        "DIR",
        "images, writable layers and records that outlive a reboot (/var/lib/orlop)",
        |k, v| {
            k.runtime.root = v.into();
            Ok(())
        },
    ),
    flag("runtime-state", "DIR", "what does not (/run/orlop)", |k, v| {
        k.runtime.state = v.into();
        Ok(())
    }),
    flag("runtime-listen", "URL", "where its CRI is served too (unix:///run/orlop/cri.sock)", |k, v| {
        if !v.starts_with("unix:///") {
            return Err("must be unix:// and an absolute path");
        }
        v.clone_into(&mut k.runtime.listen);
        Ok(())
    }),
    flag("registry-config-dir", "DIR", "folder of hosts.toml files (/etc/containerd/certs.d)", |k, v| {
        k.runtime.registry_config_dir = path(v);
        Ok(())
    }),
    flag("preload-dir", "DIR", "OCI layouts and docker archives to import at the start", |k, v| {
        k.runtime.preload_dir = path(v);
        Ok(())
    }),
    flag(
        "cni-conf-dir",
        "DIR",
        "conflists (joined: /etc/cni/net.d; standalone: none, the built-in network)",
        |k, v| {
            k.cni_conf_dir = path(v);
            Ok(())
        },
    ),
    flag("cni-bin-dir", "DIR", "programs of CNI plugins (/opt/cni/bin)", |k, v| {
        k.runtime.cni_bin_dir = v.into();
        Ok(())
    }),
    flag("log", "FILTER", "LEVEL, or LEVEL,PART=LEVEL; ORLOP_LOG says the same (info)", |k, v| {
        k.log = text(v);
        Ok(())
    }),
    flag("log-format", "FORMAT", "text, json or journald", |k, v| {
        k.log_format = Some(LogFormat::from_str(v, false).map_err(|_| "must be text, json or journald")?);
        Ok(())
    }),
];

/// Accepted for the sake of old command lines. Switches are marked.
const WITHOUT_EFFECT: &[(&str, bool)] = &[
    ("experimental-allocatable-ignore-eviction", true),
    ("experimental-mounter-path", false),
    ("keep-terminated-pod-volumes", true),
    ("log-flush-frequency", false),
    ("log-json-info-buffer-size", false),
    ("log-json-split-stream", true),
    ("log-text-info-buffer-size", false),
    ("log-text-split-stream", true),
    ("maximum-dead-containers", false),
    ("maximum-dead-containers-per-container", false),
    ("minimum-container-ttl-duration", false),
    ("pod-infra-container-image", false),
    ("runtime-cgroups", false),
    ("vmodule", false),
];

/// Flags of the kubelet that would be wrong to ignore.
const NOT_SUPPORTED: &[(&str, &str)] = &[
    ("exit-on-lock-contention", "is not supported, leave it out"),
    ("image-credential-provider-bin-dir", "credential providers are not supported, use imagePullSecrets"),
    ("image-credential-provider-config", "credential providers are not supported, use imagePullSecrets"),
    ("lock-file", "is not supported, leave it out"),
    ("manifest-url-header", "is not supported, set staticPodURLHeader in the file given with --config"),
];

const SWITCH: &str = "must be true or false";

fn path(value: &str) -> Option<PathBuf> {
    text(value).map(PathBuf::from)
}

fn text(value: &str) -> Option<String> {
    (!value.is_empty()).then(|| value.to_owned())
}

/// Reads the arguments that follow the program's name.
pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Invocation, FlagError> {
    let mut invoked = Box::<Invoked>::default();
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let Some(body) =
            argument.strip_prefix("--").or_else(|| short(&argument)).filter(|body| !body.is_empty())
        else {
            return Err(FlagError::Argument(argument));
        };
        let (name, value) = match body.split_once('=') {
            Some((name, value)) => (name.replace('_', "-"), Some(value.to_owned())),
            None => (body.replace('_', "-"), None),
        };
        match (name.as_str(), value.as_deref()) {
            ("help" | "h", _) => return Ok(Invocation::Help),
            ("version", Some("false")) => continue,
            ("version", _) => return Ok(Invocation::Version),
            _ => {}
        }
        let Some(kind) = Known::find(&name) else { return Err(FlagError::Unknown(argument)) };
        let value = match value {
            Some(value) => value,
            None if kind.is_switch(&name) => "true".to_owned(),
            None => arguments.next().ok_or_else(|| FlagError::NoValue(name.clone()))?,
        };
        kind.take(&mut invoked, name, value)?;
    }
    Ok(Invocation::Run(invoked))
}

/// The two flags that have a short form.
fn short(argument: &str) -> Option<&str> {
    argument.strip_prefix('-').filter(|body| matches!(body.split('=').next(), Some("v" | "h")))
}

/// Where a flag is to be found.
#[derive(Clone, Copy)]
enum Known {
    Flag(&'static Flag),
    WithoutEffect {
        switch: bool,
    },
    NotSupported(&'static str),
    /// A key of the file.
    Override,
}

impl Known {
    fn find(name: &str) -> Option<Self> {
        if let Some(flag) = KUBELET.iter().chain(OURS).find(|flag| flag.name == name) {
            return Some(Self::Flag(flag));
        }
        if let Some((_, switch)) = WITHOUT_EFFECT.iter().find(|(known, _)| *known == name) {
            return Some(Self::WithoutEffect { switch: *switch });
        }
        if let Some((_, problem)) = NOT_SUPPORTED.iter().find(|(known, _)| *known == name) {
            return Some(Self::NotSupported(problem));
        }
        KubeletFlags::override_names().any(|known| known == name).then_some(Self::Override)
    }

    fn is_switch(self, name: &str) -> bool {
        match self {
            Self::Flag(flag) => flag.value.is_empty(),
            Self::WithoutEffect { switch } => switch,
            // Refused in any case: no need to take what may be the next flag.
            Self::NotSupported(_) => true,
            Self::Override => KubeletFlags::is_switch(name),
        }
    }

    fn take(self, invoked: &mut Invoked, name: String, value: String) -> Result<(), FlagError> {
        match self {
            Self::Flag(flag) => (flag.take)(invoked, &value).map_err(|problem| FlagError::Value {
                flag: name,
                value,
                problem,
            }),
            Self::WithoutEffect { .. } => {
                invoked.without_effect.push(format!("--{name}"));
                Ok(())
            }
            Self::NotSupported(problem) => Err(FlagError::Value { flag: name, value, problem }),
            Self::Override => Ok(invoked.flags.set(&name, &value)?),
        }
    }
}

/// What `--help` prints.
pub fn help() -> String {
    let mut text = String::from(
        "The kubelet alone: pods, volumes, probes and the Node object, on any CRI endpoint or on the runtime in this process\n\n\
         Usage: orlop kubelet [flags]        (or kubelet [flags], where the program is called so)\n\n\
         --flag value and --flag=value are the same, _ is as good as -, and a flag wins over the file.\n",
    );
    for (title, flags) in [("Flags", KUBELET), ("Flags of the runtime in this process, and of the log", OURS)]
    {
        _ = write!(text, "\n{title}\n");
        for flag in flags {
            let left = format!("--{} {}", flag.name, flag.value);
            _ = writeln!(text, "  {left:<32}{}", flag.help);
        }
    }
    text += "  --version                       print the version of Kubernetes this kubelet stands for\n";
    text += "\nFlags that are keys of the file (--container-runtime-endpoint URL: use that runtime; empty: the one in this process)\n";
    text += &wrapped(KubeletFlags::override_names());
    text += "\nAccepted, without effect\n";
    text += &wrapped(WITHOUT_EFFECT.iter().map(|(name, _)| *name));
    text
}

/// Names in lines of a readable width.
fn wrapped(names: impl Iterator<Item = &'static str>) -> String {
    const WIDTH: usize = 110;
    let (mut text, mut line) = (String::new(), String::from(" "));
    for name in names {
        if line.len() + name.len() + 3 > WIDTH {
            text += &line;
            text.push('\n');
            line = String::from(" ");
        }
        line += " --";
        line += name;
    }
    text + &line + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn parsed(line: &str) -> Result<Invocation, FlagError> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    fn run(line: &str) -> Box<Invoked> {
        match parsed(line) {
            Ok(Invocation::Run(invoked)) => invoked,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn a_command_line_as_kubeadm_writes_it_is_understood() {
        let invoked = run(
            "--bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf --kubeconfig=/etc/kubernetes/kubelet.conf \
             --config=/var/lib/kubelet/config.yaml --container-runtime-endpoint=unix:///run/containerd/containerd.sock \
             --pod-infra-container-image=registry.k8s.io/pause:3.10 --hostname-override=n1 --node-labels=a=b --node-labels c=d",
        );
        let flags = &invoked.flags;
        assert_eq!(flags.kubeconfig.as_deref().unwrap().to_str(), Some("/etc/kubernetes/kubelet.conf"));
        assert_eq!(flags.config.as_deref().unwrap().to_str(), Some("/var/lib/kubelet/config.yaml"));
        assert_eq!(flags.overrides["containerRuntimeEndpoint"], "unix:///run/containerd/containerd.sock");
        assert_eq!(flags.node_labels.as_deref(), Some("a=b,c=d"));
        assert_eq!(invoked.without_effect, ["--pod-infra-container-image"]);
    }

    #[test]
    fn values_follow_or_are_joined_and_underscores_are_dashes() {
        let invoked = run("--max_pods 7 --root_dir=/r --eviction-hard memory.available<1Gi --node-ip=");
        assert_eq!(invoked.flags.overrides["maxPods"], 7);
        assert_eq!(invoked.flags.root_dir.as_deref().unwrap().to_str(), Some("/r"));
        assert_eq!(invoked.flags.overrides["evictionHard"]["memory.available"], "1Gi");
        assert_eq!(invoked.flags.node_ip, None);
    }

    #[test]
    fn a_switch_needs_no_value_and_takes_one_only_when_joined() {
        let invoked = run("--fail-swap-on=false --register-node --rotate-certificates --max-pods 3");
        assert_eq!(invoked.flags.register_node, Some(true));
        assert_eq!(invoked.flags.overrides["failSwapOn"], false);
        assert_eq!(invoked.flags.overrides["rotateCertificates"], true);
        let message = parsed("--fail-swap-on false").unwrap_err().to_string();
        assert!(message.contains("unexpected argument \"false\""), "{message}");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let told = |line: &str, part: &str| {
            let message = parsed(line).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        };
        told("--max-pod=3", "unknown flag --max-pod=3: see --help");
        told("-x", "unexpected argument \"-x\"");
        told("run", "unexpected argument \"run\"");
        told("--kubeconfig", "--kubeconfig needs a value");
        told("--max-pods many", "`many` is not a whole number");
        told("--register-node=perhaps", "must be true or false");
        told("--cloud-provider external", "--cloud-provider \"external\": cloud providers are not supported");
        told("--image-credential-provider-config /a", "imagePullSecrets");
        told("--runtime-listen tcp://a", "--runtime-listen");
    }

    #[test]
    fn verbosity_becomes_a_log_filter() {
        assert_eq!(run("--v=2").log, None);
        assert_eq!(run("-v 4").log.as_deref(), Some("debug"));
        assert_eq!(run("-v=10 --log-format json").log.as_deref(), Some("trace"));
        assert_eq!(run("--logging-format=json").log_format, Some(LogFormat::Json));
    }

    #[test]
    fn help_and_version_win_over_what_follows() {
        assert!(matches!(parsed("--help --nonsense"), Ok(Invocation::Help)));
        assert!(matches!(parsed("--v 2 --version"), Ok(Invocation::Version)));
        assert!(matches!(parsed("--version=false"), Ok(Invocation::Run(_))));
    }

    #[test]
    fn the_help_names_every_flag_and_no_name_has_two_meanings() {
        let help = help();
        let mut all = BTreeSet::new();
        let names = KUBELET.iter().chain(OURS).map(|flag| flag.name);
        for name in
            names.chain(WITHOUT_EFFECT.iter().map(|(name, _)| *name)).chain(KubeletFlags::override_names())
        {
            assert!(help.contains(&format!("--{name}")), "--{name} is missing");
            assert!(all.insert(name), "--{name} is there twice");
        }
        for line in help.lines() {
            assert!(line.chars().count() <= 125, "too wide: {line}");
        }
    }
}
