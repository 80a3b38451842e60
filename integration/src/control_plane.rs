//! The real control plane: etcd, kube-apiserver, kube-controller-manager and kube-scheduler, built from the modules that
//! `go.mod` pins, running in the lab's hub namespace.

use crate::kubectl::Kubectl;
use crate::netns::Netns;
use crate::peers::peer;
use crate::pki::{self, Authority};
use crate::process::Background;
use crate::wait;
use anyhow::{Context, Result};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

pub const CLUSTER_CIDR: &str = "10.244.0.0/16";
pub const SERVICE_CIDR: &str = "10.96.0.0/16";
/// The first address of the service range: the `kubernetes` service.
const KUBERNETES_SERVICE: &str = "10.96.0.1";
/// A token that nodes may join with.
pub const BOOTSTRAP_TOKEN: &str = "abcdef.0123456789abcdef";

/// A running control plane.
#[derive(Debug)]
pub struct ControlPlane {
    folder: PathBuf,
    server: String,
    authority: Authority,
    api_server: Option<Background>,
    others: Vec<Background>,
}

impl ControlPlane {
    /// Starts everything and waits until the API server answers and the lab's roles are in place.
    pub fn start(netns: &Netns, address: IpAddr, folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let authority = Authority::create(&folder.join("pki"))?;
        let server = format!("https://{address}:6443");
        authority.server(
            "apiserver",
            &["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"],
            &[address, KUBERNETES_SERVICE.parse()?, "127.0.0.1".parse()?],
        )?;
        authority.client("kubelet-client", "kube-apiserver", &["system:masters"])?;
        authority.server("service-accounts", &[], &[])?;
        for (name, user, groups) in [
            ("admin", "admin", &["system:masters"][..]),
            ("controller-manager", "system:kube-controller-manager", &[]),
            ("scheduler", "system:kube-scheduler", &[]),
        ] {
            let identity = authority.client(name, user, groups)?;
            pki::kubeconfig(&folder.join(format!("{name}.kubeconfig")), &server, &authority, &identity)?;
        }
        let mut plane =
            Self { folder: folder.to_owned(), server, authority, api_server: None, others: Vec::new() };
        plane.others.push(plane.spawn(netns, "etcd", &plane.etcd_arguments())?);
        plane.start_api_server(netns)?;
        plane.others.push(plane.spawn(
            netns,
            "kube-controller-manager",
            &plane.controller_manager_arguments(),
        )?);
        plane.others.push(plane.spawn(netns, "kube-scheduler", &plane.scheduler_arguments())?);
        plane.kubectl(netns)?.apply(include_str!("control_plane/bootstrap.yaml"))?;
        Ok(plane)
    }

    /// Starts the API server (again) and waits until it is ready.
    pub fn start_api_server(&mut self, netns: &Netns) -> Result<()> {
        let mut process = self.spawn(netns, "kube-apiserver", &self.api_server_arguments())?;
        let kubectl = self.kubectl(netns)?;
        wait::until("kube-apiserver answers /readyz", Duration::from_secs(60), || {
            process.check_alive()?;
            kubectl.run(&["get", "--raw", "/readyz"])
        })?;
        self.api_server = Some(process);
        Ok(())
    }

    /// Ends the API server, for tests of its absence.
    pub fn stop_api_server(&mut self) {
        self.api_server = None;
    }

    #[must_use]
    pub fn server(&self) -> &str {
        &self.server
    }

    #[must_use]
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    #[must_use]
    pub fn admin_kubeconfig(&self) -> PathBuf {
        self.folder.join("admin.kubeconfig")
    }

    pub fn kubectl(&self, netns: &Netns) -> Result<Kubectl> {
        Kubectl::new(netns.path(), self.admin_kubeconfig())
    }

    /// A kubeconfig good for nothing but asking for a node certificate.
    pub fn write_bootstrap_kubeconfig(&self, path: &Path) -> Result<()> {
        pki::token_kubeconfig(path, &self.server, &self.authority.certificate_pem(), BOOTSTRAP_TOKEN)
    }

    fn spawn(&self, netns: &Netns, name: &str, arguments: &[String]) -> Result<Background> {
        let mut command: Command = netns.command(peer(name)?);
        command.args(arguments);
        Background::spawn(name, &self.folder.join(format!("{name}.log")), command)
            .with_context(|| format!("start {name}"))
    }

    fn file(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    fn etcd_arguments(&self) -> Vec<String> {
        vec![
            format!("--data-dir={}", self.file("etcd")),
            "--listen-client-urls=http://127.0.0.1:2379".into(),
            "--advertise-client-urls=http://127.0.0.1:2379".into(),
            "--listen-peer-urls=http://127.0.0.1:2380".into(),
            "--unsafe-no-fsync".into(),
            "--log-level=warn".into(),
        ]
    }

    fn api_server_arguments(&self) -> Vec<String> {
        let address = self.server.trim_start_matches("https://").trim_end_matches(":6443");
        vec![
            "--etcd-servers=http://127.0.0.1:2379".into(),
            format!("--bind-address={address}"),
            format!("--advertise-address={address}"),
            "--secure-port=6443".into(),
            format!("--service-cluster-ip-range={SERVICE_CIDR}"),
            "--authorization-mode=Node,RBAC".into(),
            "--enable-admission-plugins=NodeRestriction".into(),
            "--enable-bootstrap-token-auth=true".into(),
            "--anonymous-auth=false".into(),
            "--allow-privileged=true".into(),
            "--kubelet-preferred-address-types=InternalIP".into(),
            format!("--client-ca-file={}", self.file("pki/ca.crt")),
            format!("--tls-cert-file={}", self.file("pki/apiserver.crt")),
            format!("--tls-private-key-file={}", self.file("pki/apiserver.key")),
            format!("--kubelet-client-certificate={}", self.file("pki/kubelet-client.crt")),
            format!("--kubelet-client-key={}", self.file("pki/kubelet-client.key")),
            format!("--service-account-key-file={}", self.file("pki/service-accounts.crt")),
            format!("--service-account-signing-key-file={}", self.file("pki/service-accounts.key")),
            "--service-account-issuer=https://kubernetes.default.svc".into(),
        ]
    }

    fn controller_manager_arguments(&self) -> Vec<String> {
        vec![
            format!("--kubeconfig={}", self.file("controller-manager.kubeconfig")),
            format!("--root-ca-file={}", self.file("pki/ca.crt")),
            format!("--cluster-signing-cert-file={}", self.file("pki/ca.crt")),
            format!("--cluster-signing-key-file={}", self.file("pki/ca.key")),
            format!("--service-account-private-key-file={}", self.file("pki/service-accounts.key")),
            "--use-service-account-credentials=true".into(),
            "--allocate-node-cidrs=true".into(),
            format!("--cluster-cidr={CLUSTER_CIDR}"),
            "--controllers=*,bootstrapsigner,tokencleaner".into(),
            // The default makes 20 pods a second: whoever waits for nodes should not wait for that.
            "--kube-api-qps=200".into(),
            "--kube-api-burst=400".into(),
            "--leader-elect=false".into(),
            "--bind-address=127.0.0.1".into(),
        ]
    }

    fn scheduler_arguments(&self) -> Vec<String> {
        vec![
            format!("--kubeconfig={}", self.file("scheduler.kubeconfig")),
            "--leader-elect=false".into(),
            "--bind-address=127.0.0.1".into(),
        ]
    }
}
