//! A cluster for tests: the control plane and two nodes, and short ways to write manifests.

use crate::image::Recipe;
use crate::kubectl::Kubectl;
use crate::lab::Lab;
use crate::peers::ours;
use crate::wait;
use anyhow::{Result, bail};
use serde_json::Value;
use std::time::Duration;

pub const NODES: [&str; 2] = ["node-a", "node-b"];
pub const DEMO: &str = "localhost/orlop-demo:latest";
pub const BUSYBOX: &str = "localhost/busybox:latest";
pub const MINUTE: Duration = Duration::from_secs(60);

/// Two nodes, joined and Ready, with the demo and the busybox image on both.
pub fn start(id: &str) -> Result<Lab> {
    let mut lab = Lab::create(&format!("{id}{}", std::process::id()))?;
    lab.start_control_plane()?;
    for name in NODES {
        let images = lab.folder().join(name).join("etc/images");
        for (folder, recipe) in
            [("demo", Recipe::demo(DEMO, &ours("orlop")?)), ("busybox", Recipe::busybox(BUSYBOX))]
        {
            std::fs::create_dir_all(images.join(folder))?;
            recipe.write_layout(&images.join(folder))?;
        }
        lab.join_node(name)?;
    }
    for name in NODES {
        wait_ready(&mut lab, name)?;
    }
    Ok(lab)
}

/// Waits until the API server calls a node Ready.
pub fn wait_ready(lab: &mut Lab, name: &str) -> Result<()> {
    let kubectl = lab.kubectl()?;
    wait::until(&format!("{name} is Ready"), MINUTE, || {
        lab.node(name)?.agent()?.check_alive()?;
        match kubectl.field(&["node", name], "{.status.conditions[?(@.type==\"Ready\")].status}")?.as_str() {
            "True" => Ok(()),
            other => bail!("Ready is {other:?}"),
        }
    })
}

/// A manifest of one busybox pod that runs a shell script.
#[must_use]
pub fn pod(name: &str, node: &str, restart: &str, script: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: {name}}}}}\nspec:\n  nodeName: {node}\n  \
         restartPolicy: {restart}\n  terminationGracePeriodSeconds: 5\n  containers:\n  - name: main\n    image: {BUSYBOX}\n    \
         imagePullPolicy: Never\n    command: [sh, -c, '{script}']\n"
    )
}

/// A manifest of a Deployment, DaemonSet or StatefulSet of demo pods; `version` is a way to make it differ.
#[must_use]
pub fn workload(kind: &str, name: &str, spec: &str, version: &str) -> String {
    format!(
        "apiVersion: apps/v1\nkind: {kind}\nmetadata: {{name: {name}}}\nspec:\n  {spec}\n  selector: {{matchLabels: {{app: {name}}}}}\n  \
         template:\n    metadata: {{labels: {{app: {name}}}}}\n    spec:\n      terminationGracePeriodSeconds: 2\n      containers:\n      - name: main\n        \
         image: {DEMO}\n        imagePullPolicy: Never\n        command: [/orlop, demo]\n        env: [{{name: VERSION, value: \"{version}\"}}]\n        \
         readinessProbe: {{httpGet: {{path: /, port: 8080}}, periodSeconds: 1}}\n"
    )
}

/// A manifest of the service of a workload; begins with a document separator.
#[must_use]
pub fn service(name: &str, extra: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  selector: {{app: {name}}}\n  {extra}\n  \
         ports: [{{port: 80, targetPort: 8080}}]\n"
    )
}

/// The pods with this `app` label.
pub fn pods_of(kubectl: &Kubectl, app: &str) -> Result<Vec<Value>> {
    let list = kubectl.json(&["get", "pods", "-l", &format!("app={app}")])?;
    Ok(list["items"].as_array().cloned().unwrap_or_default())
}
