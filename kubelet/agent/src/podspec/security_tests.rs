use super::*;
use serde_json::json;

fn image(uid: Option<i64>, name: &str) -> Image {
    Image { uid: uid.map(number), username: name.to_owned(), ..Default::default() }
}

fn context(
    of_pod: serde_json::Value,
    own: serde_json::Value,
    image: &Image,
) -> Result<LinuxContainerSecurityContext, SpecError> {
    let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "ns", "uid": "u"},
        "spec": {"securityContext": of_pod, "containers": [{"name": "c", "securityContext": own}]}}))
    .unwrap();
    container(&Facts::new("n"), &pod, &pod.spec.as_ref().unwrap().containers[0], image, None)
}

#[test]
fn the_user_is_the_containers_the_pods_or_the_images() {
    for (of_pod, own, image, uid, name) in [
        (json!({}), json!({}), image(Some(5), ""), Some(5), ""),
        (json!({}), json!({}), image(None, "nobody"), None, "nobody"),
        (json!({"runAsUser": 7}), json!({}), image(Some(5), ""), Some(7), ""),
        (json!({"runAsUser": 7}), json!({"runAsUser": 8}), image(None, "nobody"), Some(8), ""),
    ] {
        let context = context(of_pod, own, &image).unwrap();
        assert_eq!((context.run_as_user.map(|u| u.value), context.run_as_username.as_str()), (uid, name));
    }
}

#[test]
fn root_is_refused_where_it_is_not_wanted() {
    for (of_pod, own, image, message) in [
        (
            json!({"runAsNonRoot": true}),
            json!({}),
            image(Some(0), ""),
            "container has runAsNonRoot and image will run as root (pod: \"p_ns(u)\", container: c)",
        ),
        (
            json!({"runAsNonRoot": true}),
            json!({}),
            image(None, "web"),
            "container has runAsNonRoot and image has non-numeric user (web), cannot verify user is non-root (pod: \"p_ns(u)\", container: c)",
        ),
        (
            json!({}),
            json!({"runAsNonRoot": true, "runAsUser": 0}),
            image(Some(3), ""),
            "container's runAsUser breaks non-root policy (pod: \"p_ns(u)\", container: c)",
        ),
    ] {
        let error = context(of_pod, own, &image).unwrap_err();
        assert_eq!((error.to_string().as_str(), error.reason()), (message, "CreateContainerConfigError"));
    }
    assert!(
        context(json!({"runAsNonRoot": true}), json!({"runAsNonRoot": false}), &image(Some(0), "")).is_ok()
    );
    assert!(context(json!({"runAsNonRoot": true, "runAsUser": 5}), json!({}), &image(Some(0), "")).is_ok());
}

#[test]
fn profiles_come_from_the_container_then_the_pod_then_the_nodes_default() {
    let root = image(Some(0), "");
    let seccomp = |of_pod, own| context(of_pod, own, &root).map(|c| c.seccomp.unwrap());
    let localhost = json!({"seccompProfile": {"type": "Localhost", "localhostProfile": "a/b.json"}});
    let unconfined = json!({"seccompProfile": {"type": "Unconfined"}});
    let got = seccomp(unconfined.clone(), localhost).unwrap();
    assert_eq!(got, profile(ProfileType::Localhost, "/var/lib/kubelet/seccomp/a/b.json".into()));
    assert_eq!(seccomp(json!({}), json!({})).unwrap(), profile(ProfileType::Unconfined, String::new()));
    assert_eq!(
        seccomp(json!({"seccompProfile": {"type": "RuntimeDefault"}}), json!({})).unwrap(),
        profile(ProfileType::RuntimeDefault, String::new())
    );
    for outside in ["../x", "/etc/x", "a/../../x", ""] {
        let own = json!({"seccompProfile": {"type": "Localhost", "localhostProfile": outside}});
        assert!(seccomp(json!({}), own).is_err(), "{outside}");
    }
    let apparmor =
        context(json!({"appArmorProfile": {"type": "Localhost", "localhostProfile": "x"}}), json!({}), &root);
    assert_eq!(apparmor.unwrap().apparmor, Some(profile(ProfileType::Localhost, "x".into())));
    assert_eq!(context(json!({}), json!({}), &root).unwrap().apparmor, None);
}

#[test]
fn groups_capabilities_and_privileges_are_passed_on() {
    let got = context(
        json!({"fsGroup": 9, "supplementalGroups": [1, 2], "supplementalGroupsPolicy": "Strict", "runAsGroup": 4}),
        json!({"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "runAsUser": 1,
            "capabilities": {"add": ["NET_ADMIN"], "drop": ["ALL"]}}),
        &image(None, ""),
    )
    .unwrap();
    assert_eq!(got.supplemental_groups, [9, 1, 2]);
    assert_eq!(got.supplemental_groups_policy(), SupplementalGroupsPolicy::Strict);
    assert_eq!(got.run_as_group.map(|group| group.value), Some(4));
    assert!(got.no_new_privs && got.readonly_rootfs && !got.privileged);
    let capabilities = got.capabilities.unwrap();
    assert_eq!(capabilities.add_capabilities, ["NET_ADMIN"]);
    assert_eq!(capabilities.drop_capabilities, ["ALL"]);
    assert!(got.masked_paths.contains(&"/proc/kcore".to_owned()));
    let unmasked = context(json!({}), json!({"procMount": "Unmasked"}), &image(None, "")).unwrap();
    assert!(unmasked.masked_paths.is_empty() && unmasked.readonly_paths.is_empty());
}

#[test]
fn user_namespaces_are_refused_rather_than_ignored() {
    let pod: Pod = serde_json::from_value(json!({"spec": {"containers": [], "hostUsers": false}})).unwrap();
    assert!(matches!(sandbox(&pod), Err(SpecError::UserNamespace)));
}
