use super::*;
use orlop_proto::cri::{
    Capability as CriCapability, ContainerMetadata, ImageSpec, KeyValue, LinuxContainerConfig,
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, PodSandboxMetadata,
};
use std::collections::BTreeMap;

fn sandbox() -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: "web-0".into(),
            uid: "u1".into(),
            namespace: "default".into(),
            attempt: 0,
        }),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: "/kubepods/burstable/podu1".into(),
            security_context: Some(LinuxSandboxSecurityContext::default()),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn container() -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: "web".into(), attempt: 0 }),
        image: Some(ImageSpec {
            image: "sha256:1".into(),
            user_specified_image: "web:1".into(),
            ..Default::default()
        }),
        command: vec!["/bin/web".into()],
        envs: vec![KeyValue { key: "A".into(), value: b"1".to_vec() }],
        linux: Some(LinuxContainerConfig {
            resources: Some(LinuxContainerResources {
                memory_limit_in_bytes: 1 << 20,
                oom_score_adj: -997,
                ..Default::default()
            }),
            security_context: Some(LinuxContainerSecurityContext {
                masked_paths: vec!["/proc/kcore".into()],
                readonly_paths: vec!["/proc/sys".into()],
                no_new_privs: true,
                capabilities: Some(CriCapability {
                    drop_capabilities: vec!["ALL".into()],
                    add_capabilities: vec!["CHOWN".into()],
                    ..Default::default()
                }),
                namespace_options: Some(NamespaceOption {
                    pid: NamespaceMode::Container as i32,
                    ..Default::default()
                }),
                ..Default::default()
            }),
        }),
        ..Default::default()
    }
}

fn build_with(config: &ContainerConfig, pid: Option<u32>) -> Spec {
    let sandbox = sandbox();
    let dir = SandboxDir("/run/orlop/sandboxes/s".into());
    let host = HostFacts {
        capabilities: capabilities::from_mask(u64::MAX),
        controllers: Controllers(["memory".to_owned()].into()),
        oom_score_floor: Some(0),
        ..HostFacts::default()
    };
    build(&Input {
        id: "c",
        config,
        sandbox: SandboxFacts {
            id: "s",
            config: &sandbox,
            dir: &dir,
            pid_namespace_of: pid,
            hostname: "web-0",
        },
        image: &ImageConfiguration::default(),
        user: &User { uid: 7, gid: 8, groups: vec![8] },
        binds: &[],
        devices: &[],
        rootfs: Path::new("/run/orlop/bundles/c/rootfs"),
        host: &host,
    })
    .unwrap()
}

fn namespace_paths(spec: &Spec) -> BTreeMap<String, Option<String>> {
    let namespaces = spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
    namespaces
        .iter()
        .map(|n| (n.typ().to_string(), n.path().as_ref().map(|p| p.display().to_string())))
        .collect()
}

#[test]
fn an_ordinary_container_is_configured_as_on_any_node() {
    let spec = build_with(&container(), None);
    let mut golden: serde_json::Value = serde_json::from_str(include_str!("golden.json")).unwrap();
    let mut actual = serde_json::to_value(&spec).unwrap();
    for value in [&mut golden, &mut actual] {
        // A set has no order.
        if let Some(namespaces) = value.pointer_mut("/linux/namespaces").and_then(|n| n.as_array_mut()) {
            namespaces.sort_by_key(ToString::to_string);
        }
    }
    assert_eq!(actual, golden, "{}", serde_json::to_string_pretty(&actual).unwrap());
}

#[test]
fn the_pods_pid_namespace_is_joined_when_it_is_shared() {
    let mut config = container();
    let options = |config: &mut ContainerConfig, change: &dyn Fn(&mut NamespaceOption)| {
        let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        change(context.namespace_options.as_mut().unwrap());
    };
    assert_eq!(namespace_paths(&build_with(&config, Some(42)))["pid"], None);
    options(&mut config, &|o| o.pid = NamespaceMode::Pod as i32);
    assert_eq!(namespace_paths(&build_with(&config, Some(42)))["pid"].as_deref(), Some("/proc/42/ns/pid"));
    options(&mut config, &|o| {
        o.pid = NamespaceMode::Node as i32;
        o.network = NamespaceMode::Node as i32;
        o.ipc = NamespaceMode::Node as i32;
    });
    let host = namespace_paths(&build_with(&config, None));
    assert_eq!(host.keys().collect::<Vec<_>>(), ["cgroup", "mnt"]);
}

#[test]
fn a_privileged_container_is_not_masked() {
    let mut config = container();
    let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    context.privileged = true;
    assert!(matches!(check(&config, &sandbox()), Err(SpecError::PrivilegedSandbox)));
    let spec = build_with(&config, None);
    let linux = spec.linux().as_ref().unwrap();
    assert!(linux.masked_paths().is_none() && linux.readonly_paths().is_none());
    assert!(!namespace_paths(&spec).contains_key("cgroup"));
    let rules = linux.resources().as_ref().unwrap().devices().as_ref().unwrap();
    assert!(rules.len() == 1 && rules[0].allow());
    let capabilities = spec.process().as_ref().unwrap().capabilities().as_ref().unwrap();
    assert_eq!(capabilities.bounding().as_ref().unwrap().len(), 41);
}
