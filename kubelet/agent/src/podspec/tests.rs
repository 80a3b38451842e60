//! Whole pods: from YAML to what the runtime is asked for, compared with files under `testdata/`. With `UPDATE_GOLDEN` set
//! the files are written instead. And the environment, which needs objects.

use super::*;
use crate::objects::fake::Fake;
use crate::objects::{Objects, ServiceFacts, ServicePort};
use crate::volumes::{MountedVolume, MountedVolumes};
use k8s_openapi::api::core::v1::{Container, Pod};
use orlop_proto::cri::{self, Image};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

fn facts(root: &Path) -> Facts {
    let mut facts = Facts::new("node-1");
    facts.root_dir = root.join("kubelet");
    facts.pod_logs_dir = root.join("pods");
    facts.resolv_conf = Some(root.join("resolv.conf"));
    facts.etc_hosts = root.join("hosts");
    facts.cluster_dns = vec!["10.96.0.10".parse().unwrap()];
    facts.host_ips = vec!["192.0.2.10".parse().unwrap()];
    facts.memory_capacity = 8 << 30;
    facts.hugepage_sizes = vec![2 << 20];
    facts.swap_accounting = true;
    facts.recursive_read_only_handlers = vec![String::new()];
    std::fs::write(root.join("resolv.conf"), "nameserver 192.0.2.53\nsearch corp\n").unwrap();
    std::fs::write(root.join("hosts"), "127.0.0.1 localhost\n").unwrap();
    facts
}

fn objects() -> Objects {
    let fake = Arc::new(Fake::default());
    fake.put_config_map("default", "conf", &[("level", "debug"), ("color", "blue")]);
    fake.put_secret("default", "cred", &[("password", b"pass$(HOME)"), ("raw", &[0xff, 0xfe])]);
    let service = |namespace: &str, name: &str, ip: &str| ServiceFacts {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        cluster_ip: Some(ip.parse().unwrap()),
        ports: vec![ServicePort { name: "https".into(), port: 443, protocol: "TCP".into() }],
    };
    fake.put_service(service("default", "kubernetes", "10.96.0.1"));
    fake.put_service(service("default", "web", "10.96.0.2"));
    fake.put_service(service("other", "hidden", "10.96.0.3"));
    Objects::new(fake)
}

/// Places for the pod's volumes as the volume code would name them.
fn mounted(pod: &Pod, facts: &Facts) -> MountedVolumes {
    let mut mounted = MountedVolumes::default();
    for volume in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
        let path = match &volume.host_path {
            Some(source) => source.path.clone().into(),
            None => facts.pod_dir(uid(pod)).join("volumes/kubernetes.io~empty-dir").join(&volume.name),
        };
        let read_only = volume.empty_dir.is_none() && volume.host_path.is_none();
        mounted.insert(&volume.name, MountedVolume { path, read_only });
    }
    mounted
}

async fn described(pod: &Pod, facts: &Facts, root: &Path) -> Value {
    let objects = objects();
    let sandbox = match sandbox_spec(facts, pod, 1).await {
        Ok(spec) => json!({"config": sandbox_json(&spec.config),
            "warnings": spec.warnings.iter().map(|w| w.reason).collect::<Vec<_>>()}),
        Err(error) => json!({"error": error.to_string()}),
    };
    let spec = pod.spec.as_ref().unwrap();
    let mut containers = Vec::new();
    let mounted = mounted(pod, facts);
    let ephemeral: Vec<Container> =
        spec.ephemeral_containers.iter().flatten().map(ephemeral_as_container).collect();
    let init = spec.init_containers.iter().flatten().map(|container| (container, ContainerKind::Init));
    let main = spec.containers.iter().map(|container| (container, ContainerKind::Main));
    let late = ephemeral.iter().map(|container| (container, ContainerKind::Ephemeral));
    for (container, kind) in init.chain(main).chain(late) {
        let image = Image { uid: Some(cri::Int64Value { value: 0 }), ..Default::default() };
        let inputs = ContainerInputs {
            pod,
            container,
            kind,
            attempt: 2,
            image: &image,
            image_ref: "sha256:abc",
            pod_ips: &["10.1.0.2".parse().unwrap()],
            mounted: &mounted,
            target_id: (kind == ContainerKind::Ephemeral).then_some("target-id"),
        };
        containers.push(match container_config(facts, &objects, inputs).await {
            Ok(config) => container_json(&config),
            Err(error) => json!({"error": error.to_string(), "reason": error.reason()}),
        });
    }
    let text = json!({"sandbox": sandbox, "containers": containers}).to_string();
    serde_json::from_str(&text.replace(root.to_str().unwrap(), "$ROOT")).unwrap()
}

fn sorted<K: Ord + Clone, V: Clone>(map: &std::collections::HashMap<K, V>) -> BTreeMap<K, V> {
    map.iter().map(|(key, value)| (key.clone(), value.clone())).collect()
}

fn number(value: Option<&cri::Int64Value>) -> Value {
    value.map_or(Value::Null, |value| json!(value.value))
}

fn profile(profile: Option<&cri::SecurityProfile>) -> Value {
    profile.map_or(Value::Null, |p| json!([p.profile_type().as_str_name(), p.localhost_ref]))
}

fn namespaces(options: Option<&cri::NamespaceOption>) -> Value {
    options.map_or(Value::Null, |o| {
        json!({"network": o.network().as_str_name(), "pid": o.pid().as_str_name(), "ipc": o.ipc().as_str_name(),
            "target": o.target_id})
    })
}

fn resources(resources: Option<&cri::LinuxContainerResources>) -> Value {
    resources.map_or(Value::Null, |r| {
        json!({"cpu": [r.cpu_shares, r.cpu_quota, r.cpu_period], "memory": r.memory_limit_in_bytes,
            "oom": r.oom_score_adj, "unified": sorted(&r.unified),
            "hugepages": r.hugepage_limits.iter().map(|l| json!([l.page_size, l.limit])).collect::<Vec<_>>()})
    })
}

fn sandbox_json(config: &cri::PodSandboxConfig) -> Value {
    let metadata = config.metadata.as_ref().unwrap();
    let dns = config.dns_config.as_ref().unwrap();
    let linux = config.linux.as_ref().unwrap();
    let security = linux.security_context.as_ref().unwrap();
    let ports = config
        .port_mappings
        .iter()
        .map(|p| json!([p.protocol().as_str_name(), p.container_port, p.host_port, p.host_ip]));
    json!({
        "metadata": [metadata.name, metadata.uid, metadata.namespace, metadata.attempt],
        "hostname": config.hostname, "log_directory": config.log_directory,
        "dns": {"servers": dns.servers, "searches": dns.searches, "options": dns.options},
        "ports": ports.collect::<Vec<_>>(),
        "labels": sorted(&config.labels), "annotations": sorted(&config.annotations),
        "cgroup_parent": linux.cgroup_parent, "sysctls": sorted(&linux.sysctls),
        "resources": resources(linux.resources.as_ref()), "overhead": resources(linux.overhead.as_ref()),
        "security": {
            "namespaces": namespaces(security.namespace_options.as_ref()),
            "user": number(security.run_as_user.as_ref()), "group": number(security.run_as_group.as_ref()),
            "groups": security.supplemental_groups, "privileged": security.privileged,
            "seccomp": profile(security.seccomp.as_ref()),
        },
    })
}

fn container_json(config: &cri::ContainerConfig) -> Value {
    let metadata = config.metadata.as_ref().unwrap();
    let image = config.image.as_ref().unwrap();
    let linux = config.linux.as_ref().unwrap();
    let security = linux.security_context.as_ref().unwrap();
    let envs = config
        .envs
        .iter()
        .map(|env| format!("{}={}", env.key, String::from_utf8(env.value.clone()).unwrap()));
    let mounts = config.mounts.iter().map(|mount| {
        json!({"at": mount.container_path, "from": mount.host_path, "ro": mount.readonly,
            "rro": mount.recursive_read_only, "propagation": mount.propagation().as_str_name()})
    });
    // Which processors have a throttle directory is up to the machine.
    let masked = security.masked_paths.iter().filter(|path| !path.contains("thermal_throttle")).count();
    json!({
        "metadata": [metadata.name, metadata.attempt],
        "image": [image.image, image.user_specified_image],
        "command": config.command, "args": config.args, "working_dir": config.working_dir,
        "env": envs.collect::<Vec<_>>(), "mounts": mounts.collect::<Vec<_>>(),
        "labels": sorted(&config.labels), "annotations": sorted(&config.annotations),
        "log_path": config.log_path, "stdio": [config.stdin, config.stdin_once, config.tty],
        "stop_signal": config.stop_signal().as_str_name(),
        "resources": resources(linux.resources.as_ref()),
        "security": {
            "namespaces": namespaces(security.namespace_options.as_ref()),
            "user": number(security.run_as_user.as_ref()), "username": security.run_as_username,
            "group": number(security.run_as_group.as_ref()), "groups": security.supplemental_groups,
            "privileged": security.privileged, "readonly": security.readonly_rootfs,
            "no_new_privs": security.no_new_privs,
            "capabilities": security.capabilities.as_ref().map(|c| json!([c.add_capabilities, c.drop_capabilities])),
            "masked": masked, "readonly_paths": security.readonly_paths.len(),
            "seccomp": profile(security.seccomp.as_ref()), "apparmor": profile(security.apparmor.as_ref()),
        },
    })
}

#[test]
fn pods_become_the_configurations_on_file() {
    crate::volumes::in_private_mounts(|| async {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/podspec");
        let update = std::env::var_os("UPDATE_GOLDEN").is_some();
        let mut names: Vec<_> = std::fs::read_dir(&data)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "yaml"))
            .collect();
        names.sort();
        assert!(names.len() >= 12, "the pods are missing");
        for path in names {
            let root = tempfile::tempdir().unwrap();
            let facts = facts(root.path());
            let pod: Pod = serde_saphyr::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
            for volume in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
                let dir = facts.pod_dir(uid(&pod)).join("volumes/kubernetes.io~empty-dir").join(&volume.name);
                std::fs::create_dir_all(dir).unwrap();
            }
            let got = format!("{:#}\n", described(&pod, &facts, root.path()).await);
            release_subpaths(&facts.pod_dir(uid(&pod))).unwrap();
            let golden = path.with_extension("json");
            if update {
                std::fs::write(&golden, got).unwrap();
            } else {
                let expected = std::fs::read_to_string(&golden).unwrap_or_default();
                assert_eq!(got, expected, "{}", path.display());
            }
        }
    });
}

async fn variables(env: Value, from: Value, links: bool) -> Result<Vec<String>, String> {
    let pod: Pod =
        serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "default", "uid": "u"},
        "spec": {"enableServiceLinks": links, "containers": [{"name": "c", "env": env, "envFrom": from}]}}))
        .unwrap();
    let facts = Facts::new("n");
    let container = &pod.spec.as_ref().unwrap().containers[0];
    let objects = objects();
    let request = env::Request { facts: &facts, objects: &objects, pod: &pod, container, pod_ips: &[] };
    let env = env::environment(request).await.map_err(|error| error.to_string())?;
    let own = env.iter().filter(|(name, _)| !name.starts_with("KUBERNETES_"));
    Ok(own.map(|(name, value)| format!("{name}={value}")).collect())
}

#[tokio::test]
async fn variables_come_in_order_and_later_ones_win() {
    let key = |name: &str, key: &str| json!({"configMapKeyRef": {"name": name, "key": key}});
    for (env, from, expected) in [
        (
            json!([{"name": "B", "value": "1"}, {"name": "A", "value": "$(B)2"}]),
            json!([]),
            vec!["B=1", "A=12"],
        ),
        (
            json!([{"name": "A", "value": "$(B)"}, {"name": "B", "value": "1"}]),
            json!([]),
            vec!["A=$(B)", "B=1"],
        ),
        (
            json!([{"name": "color", "value": "red"}, {"name": "X", "value": "$(color)-$(level)-$$(level)"}]),
            json!([{"configMapRef": {"name": "conf"}}]),
            vec!["color=red", "level=debug", "X=red-debug-$(level)"],
        ),
        (
            json!([]),
            json!([{"prefix": "P_", "configMapRef": {"name": "conf"}}]),
            vec!["P_color=blue", "P_level=debug"],
        ),
        (
            json!([{"name": "S", "valueFrom": {"secretKeyRef": {"name": "cred", "key": "password"}}},
                {"name": "T", "value": "$(S)"}]),
            json!([]),
            vec!["S=pass$(HOME)", "T=pass$(HOME)"],
        ),
        (json!([{"name": "L", "valueFrom": key("conf", "level")}]), json!([]), vec!["L=debug"]),
        (
            json!([{"name": "N", "valueFrom": {"configMapKeyRef": {"name": "no", "key": "k", "optional": true}}}]),
            json!([{"secretRef": {"name": "no", "optional": true}}]),
            vec![],
        ),
        (json!([{"name": "K", "value": "$(KUBERNETES_SERVICE_HOST)"}]), json!([]), vec!["K=10.96.0.1"]),
        (json!([{"name": "A", "value": "1"}, {"name": "A", "value": "$(A)2"}]), json!([]), vec!["A=12"]),
        (json!([{"name": "E", "value": ""}]), json!([]), vec!["E="]),
    ] {
        let expected: Vec<String> = expected.into_iter().map(str::to_owned).collect();
        assert_eq!(variables(env.clone(), from, false).await, Ok(expected), "{env}");
    }
    let linked = variables(json!([{"name": "WEB_PORT", "value": "mine"}]), json!([]), true).await.unwrap();
    assert!(
        linked.contains(&"WEB_PORT=mine".to_owned())
            && linked.contains(&"WEB_SERVICE_HOST=10.96.0.2".to_owned())
    );
    assert!(linked.iter().all(|variable| !variable.starts_with("HIDDEN")));
}

#[tokio::test]
async fn missing_objects_and_keys_are_named() {
    for (env, from, message) in [
        (json!([]), json!([{"configMapRef": {"name": "x"}}]), "configmap \"x\" not found"),
        (json!([]), json!([{"secretRef": {"name": "x"}}]), "secret \"x\" not found"),
        (
            json!([{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "conf", "key": "k"}}}]),
            json!([]),
            "couldn't find key k in ConfigMap default/conf",
        ),
        (
            json!([{"name": "A", "valueFrom": {"secretKeyRef": {"name": "cred", "key": "k"}}}]),
            json!([]),
            "couldn't find key k in Secret default/cred",
        ),
        (
            json!([{"name": "A", "valueFrom": {"secretKeyRef": {"name": "cred", "key": "raw"}}}]),
            json!([]),
            "value of key raw in Secret default/cred is not text",
        ),
        (
            json!([{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.nope"}}}]),
            json!([]),
            "environment variable \"A\": unsupported fieldPath: spec.nope",
        ),
        (
            json!([{"name": "A", "valueFrom": {}}]),
            json!([]),
            "environment variable \"A\": value is missing or has no known form",
        ),
    ] {
        assert_eq!(variables(env, from, false).await, Err(message.to_owned()));
    }
}

#[tokio::test(start_paused = true)]
async fn only_pods_of_the_api_wait_for_services() {
    let fake = Arc::new(Fake::default());
    fake.gone.store(true, std::sync::atomic::Ordering::SeqCst);
    let objects = Objects::new(fake);
    let facts = Facts::new("n");
    for (source, outcome) in [
        ("file", Ok(0)),
        ("api", Err("services have not yet been read at least once, cannot construct envvars".to_owned())),
    ] {
        let pod: Pod = serde_json::from_value(
            json!({"metadata": {"annotations": {"kubernetes.io/config.source": source}},
            "spec": {"containers": [{"name": "c"}]}}),
        )
        .unwrap();
        let container = &pod.spec.as_ref().unwrap().containers[0];
        let request = env::Request { facts: &facts, objects: &objects, pod: &pod, container, pod_ips: &[] };
        let before = tokio::time::Instant::now();
        let got =
            env::environment(request).await.map(|env| env.iter().count()).map_err(|error| error.to_string());
        assert_eq!(got, outcome, "{source}");
        assert_eq!(before.elapsed().is_zero(), source == "file", "{source}");
    }
}
