//! The verbs.

use super::SUPPORTED_VERSIONS;
use super::config::NetConf;
use super::error::{Code, PluginError};
use super::result::{self, Shape};
use crate::network::{Attach, LeaseError, NetworkError, PodNetwork};
use serde_json::{Value, json};
use std::path::PathBuf;

/// What a runtime says in the environment, as it says it.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// The last component of the program's name.
    pub program: String,
    pub command: String,
    pub container_id: String,
    pub netns: String,
    pub ifname: String,
    pub args: String,
}

impl Environment {
    /// Reads the process's own.
    #[must_use]
    pub fn of_process() -> Self {
        let var = |name| std::env::var(name).unwrap_or_default();
        let program = std::env::args_os().next().map(PathBuf::from);
        let program = program.as_deref().and_then(|path| path.file_name()).unwrap_or_default();
        Self {
            program: program.to_string_lossy().into_owned(),
            command: var("CNI_COMMAND"),
            container_id: var("CNI_CONTAINERID"),
            netns: var("CNI_NETNS"),
            ifname: var("CNI_IFNAME"),
            args: var("CNI_ARGS"),
        }
    }

    fn check_attachment(&self, netns_required: bool) -> Result<(), PluginError> {
        let wrong = |message: String| Err(PluginError::new(Code::InvalidEnvironment, message));
        let missing: Vec<&str> = [
            ("CNI_CONTAINERID", self.container_id.is_empty()),
            ("CNI_IFNAME", self.ifname.is_empty()),
            ("CNI_NETNS", netns_required && self.netns.is_empty()),
        ]
        .iter()
        .filter_map(|(name, missing)| missing.then_some(*name))
        .collect();
        if !missing.is_empty() {
            return wrong(format!("required environment variables are missing: {}", missing.join(", ")));
        }
        let id = self.container_id.as_bytes();
        let fits = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
        if !id[0].is_ascii_alphanumeric() || !id.iter().all(fits) {
            return wrong(format!("CNI_CONTAINERID {:?} has characters it must not have", self.container_id));
        }
        self.check_args()
    }

    /// We know none of the arguments but the one that says to ignore unknown ones.
    fn check_args(&self) -> Result<(), PluginError> {
        let pairs: Vec<(&str, &str)> = self
            .args
            .split(';')
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                pair.split_once('=').ok_or_else(|| {
                    PluginError::new(
                        Code::InvalidEnvironment,
                        format!("CNI_ARGS has {pair:?}, which is no pair"),
                    )
                })
            })
            .collect::<Result<_, _>>()?;
        let ignore = pairs.iter().any(|(key, value)| {
            key.eq_ignore_ascii_case("IgnoreUnknown") && matches!(*value, "1" | "true" | "True" | "TRUE")
        });
        match pairs.iter().find(|(key, _)| !key.eq_ignore_ascii_case("IgnoreUnknown")) {
            Some((key, _)) if !ignore => {
                Err(PluginError::new(Code::InvalidEnvironment, format!("CNI_ARGS has unknown key {key:?}")))
            }
            _ => Ok(()),
        }
    }
}

/// Performs the command; standard output's content, if any.
///
/// # Errors
/// [`PluginError`], to be written in the version that [`version_of`] finds.
pub async fn run(environment: &Environment, stdin: &[u8]) -> Result<Option<String>, PluginError> {
    match environment.command.as_str() {
        "VERSION" => Ok(Some(version(stdin))),
        "ADD" => add(environment, stdin).await.map(|result| Some(result.to_string())),
        "DEL" => delete(environment, stdin).await.map(|()| None),
        "CHECK" => check(environment, stdin).await.map(|()| None),
        "GC" => collect(environment, stdin).await.map(|()| None),
        "STATUS" => status(environment, stdin).await.map(|()| None),
        "" => Err(PluginError::new(
            Code::InvalidEnvironment,
            "CNI_COMMAND is missing: this is a CNI plugin, to be started by a container runtime",
        )),
        other => Err(PluginError::new(Code::InvalidEnvironment, format!("CNI_COMMAND {other:?} is unknown"))),
    }
}

/// The version errors are written in.
#[must_use]
pub fn version_of(stdin: &[u8]) -> String {
    let asked: Option<Value> = serde_json::from_slice(stdin).ok();
    let asked = asked.as_ref().and_then(|conf| conf["cniVersion"].as_str());
    asked.filter(|version| SUPPORTED_VERSIONS.contains(version)).unwrap_or("1.1.0").to_owned()
}

fn version(stdin: &[u8]) -> String {
    json!({"cniVersion": version_of(stdin), "supportedVersions": SUPPORTED_VERSIONS}).to_string()
}

fn parse(stdin: &[u8]) -> Result<(NetConf, Shape), PluginError> {
    let conf = NetConf::parse(stdin)?;
    let shape = result::shape(&conf.cni_version)?;
    Ok((conf, shape))
}

fn attachment(environment: &Environment) -> Attach {
    let mut attach = Attach::new(&environment.container_id, &environment.netns);
    attach.ifname.clone_from(&environment.ifname);
    attach
}

async fn add(environment: &Environment, stdin: &[u8]) -> Result<Value, PluginError> {
    environment.check_attachment(true)?;
    let (conf, shape) = parse(stdin)?;
    let config = conf.network(environment)?;
    let mut attach = attachment(environment);
    attach.port_mappings = conf.port_mappings()?;
    attach.requested_ips = conf.requested_ips()?;
    attach.requested_mac = match &conf.runtime_config.mac {
        Some(text) => Some(text.parse().map_err(|error| {
            PluginError::new(Code::InvalidConfig, "the requested MAC address is not one").details(error)
        })?),
        None => None,
    };
    let network = PodNetwork::open(config.clone())?;
    let attached = network.attach(&attach).await?;
    let place = (environment.ifname.as_str(), environment.netns.as_str());
    let built = result::build(&conf.cni_version, shape, (&config, &attached), place);
    Ok(merge(conf.prev_result, built))
}

/// In a chain, what others made comes first; indices of interfaces move.
fn merge(previous: Option<Value>, mut own: Value) -> Value {
    let Some(Value::Object(mut merged)) = previous else { return own };
    let before = merged.get("interfaces").and_then(Value::as_array).map_or(0, Vec::len);
    for ip in own["ips"].as_array_mut().into_iter().flatten() {
        ip["interface"] = json!(before + 2);
    }
    let Value::Object(own) = own else { return Value::Object(merged) };
    for (key, value) in own {
        match (merged.get_mut(&key), value) {
            (Some(Value::Array(existing)), Value::Array(more)) => existing.extend(more),
            (Some(_), Value::Object(empty)) if empty.is_empty() => {}
            (_, value) => {
                merged.insert(key, value);
            }
        }
    }
    Value::Object(merged)
}

async fn delete(environment: &Environment, stdin: &[u8]) -> Result<(), PluginError> {
    environment.check_attachment(false)?;
    let (conf, _) = parse(stdin)?;
    let network = PodNetwork::open(conf.teardown(environment))?;
    Ok(network.detach_interface(&environment.container_id, &environment.ifname).await?)
}

async fn check(environment: &Environment, stdin: &[u8]) -> Result<(), PluginError> {
    environment.check_attachment(true)?;
    let (conf, _) = parse(stdin)?;
    let previous = conf.prev_result.as_ref();
    let previous = previous.ok_or_else(|| PluginError::new(Code::InvalidConfig, "CHECK needs prevResult"))?;
    let expected = result::addresses(previous, &environment.ifname);
    let network = PodNetwork::open(conf.network(environment)?)?;
    Ok(network.check(&attachment(environment), &expected).await?)
}

async fn collect(environment: &Environment, stdin: &[u8]) -> Result<(), PluginError> {
    let (conf, _) = parse(stdin)?;
    let valid = conf
        .valid_attachments
        .as_ref()
        .ok_or_else(|| PluginError::new(Code::InvalidConfig, "GC needs cni.dev/valid-attachments"))?;
    // Host ports are told from those of other networks by the subnets, which may be unknown by now.
    let config = conf.network(environment).unwrap_or_else(|_| conf.teardown(environment));
    let network = PodNetwork::open(config)?;
    let is_valid = |id: &str, ifname: &str| valid.iter().any(|v| v.container_id == id && v.ifname == ifname);
    Ok(network.retain_interfaces(is_valid).await?)
}

async fn status(environment: &Environment, stdin: &[u8]) -> Result<(), PluginError> {
    let (conf, _) = parse(stdin)?;
    let ready = match conf.network(environment) {
        Ok(config) => PodNetwork::open(config)?.status().await,
        Err(error) => return Err(PluginError { code: Code::NotAvailable, ..error }),
    };
    ready.map_err(|error| {
        // Pods that are connected already go on working.
        let code = match &error {
            NetworkError::Lease(LeaseError::Exhausted { .. }) => Code::NotAvailable,
            _ => Code::NotAvailableLimited,
        };
        PluginError { code, ..error.into() }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(id: &str, args: &str) -> Environment {
        Environment {
            container_id: id.to_owned(),
            netns: "/n".to_owned(),
            ifname: "eth0".to_owned(),
            args: args.to_owned(),
            ..Environment::default()
        }
    }

    #[test]
    fn the_environment_is_checked_as_the_specification_wants() {
        assert!(environment("a-1.b_2", "IgnoreUnknown=1;K8S_POD_NAME=x").check_attachment(true).is_ok());
        assert!(environment("a", "").check_attachment(true).is_ok());
        for (id, args) in [("", ""), ("-a", ""), ("a/b", ""), ("a", "K8S_POD_NAME=x"), ("a", "nonsense")] {
            let error = environment(id, args).check_attachment(true).unwrap_err();
            assert_eq!(error.code, Code::InvalidEnvironment, "{id} {args}");
        }
        assert!(Environment { netns: String::new(), ..environment("a", "") }.check_attachment(false).is_ok());
    }

    #[test]
    fn a_previous_result_is_kept_and_indices_move() {
        let previous = json!({"interfaces": [{"name": "x"}], "ips": [{"address": "1.2.3.4/24", "interface": 0}], "dns": {"domain": "d"}});
        let own = json!({"cniVersion": "1.0.0", "interfaces": [{}, {}, {}], "ips": [{"address": "10.0.0.2/24", "interface": 2}], "dns": {}});
        let merged = merge(Some(previous), own);
        assert_eq!(merged["interfaces"].as_array().unwrap().len(), 4);
        assert_eq!(merged["ips"][1]["interface"], 3);
        assert_eq!(merged["dns"]["domain"], "d");
    }

    proptest::proptest! {
        #[test]
        fn no_input_makes_the_parser_panic(text in "[ -~]{0,200}") {
            let _ = parse(text.as_bytes());
            let _ = version_of(text.as_bytes());
        }
    }
}
