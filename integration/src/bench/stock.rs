//! The stock node: the real kubelet on containerd, joined to the lab's control plane like an orlop node.

use crate::bench::runtimes::{self, PodNetwork};
use crate::image::Recipe;
use crate::lab::Lab;
use crate::peers::peer;
use crate::process::Background;
use anyhow::{Context, Result};

pub const STOCK: &str = "stock";

/// kubelet and containerd; both end with the value.
#[derive(Debug)]
pub struct Stock {
    kubelet: Background,
    containerd: Background,
}

impl Stock {
    pub fn start(lab: &mut Lab) -> Result<Self> {
        let (bootstrap, authority) = {
            let folder = lab.folder().join(STOCK).join("etc");
            std::fs::create_dir_all(&folder)?;
            let plane = lab.control_plane()?;
            let bootstrap = folder.join("bootstrap.kubeconfig");
            plane.write_bootstrap_kubeconfig(&bootstrap)?;
            (bootstrap, plane.authority().certificate())
        };
        let node = lab.add_node(STOCK)?;
        let containerd = runtimes::start_containerd(node, PodNetwork { subnet: "10.88.0.0/16" })?;
        runtimes::import(node, "bench", Recipe::busybox(runtimes::IMAGE))?;
        let config = node.folder().join("etc/kubelet.yaml");
        std::fs::write(
            &config,
            kubelet_config(&authority.display().to_string(), runtimes::limits_work(node.cgroup())),
        )?;
        let arguments = [
            format!("--config={}", config.display()),
            format!("--bootstrap-kubeconfig={}", bootstrap.display()),
            "--kubeconfig=/var/lib/kubelet/kubeconfig".to_owned(),
            "--cert-dir=/var/lib/kubelet/pki".to_owned(),
            format!("--hostname-override={STOCK}"),
            format!("--node-ip={}", node.address()),
        ];
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let kubelet =
            node.service(&peer("kubelet")?, "kubelet", &arguments).context("start the stock kubelet")?;
        Ok(Self { kubelet, containerd })
    }

    pub fn check_alive(&mut self) -> Result<()> {
        self.containerd.check_alive()?;
        self.kubelet.check_alive()
    }
}

/// The defaults, but for what a machine without limits and without systemd cannot give.
fn kubelet_config(authority: &str, limits: bool) -> String {
    let bare = if limits { "" } else { "cgroupsPerQOS: false\nenforceNodeAllocatable: []\n" };
    format!(
        "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
         authentication:\n  x509: {{clientCAFile: {authority}}}\n\
         containerRuntimeEndpoint: unix:///run/containerd/containerd.sock\n\
         cgroupDriver: cgroupfs\n{bare}failSwapOn: false\noomScoreAdj: 0\nrotateCertificates: true\n\
         volumePluginDir: /var/lib/kubelet/volume-plugins\nclusterDomain: cluster.local\n"
    )
}
