//! Lifecycle hooks: what a container wants done after its start and before its stop.

use crate::cri::Cri;
use crate::probes::http_client::{self, HttpError};
use crate::probes::{Ended, HttpTarget, TargetError, exec};
use k8s_openapi::api::core::v1::{Container, LifecycleHandler, Pod};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::net::IpAddr;
use std::time::Duration;

const AGENT: &str = "kube-lifecycle/1.36";

/// A hook that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    #[error("hook did not finish within {0:?}")]
    Deadline(Duration),
    #[error("command {command:?} exited with {code}: {output}")]
    Exit { command: String, code: i32, output: String },
    #[error("cannot run command {command:?}: {message}")]
    Exec { command: String, message: String },
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error("Get {url:?}: {cause}")]
    Http { url: String, cause: String },
    #[error("hook of type tcpSocket is not supported; use exec, httpGet or sleep")]
    TcpSocket,
    #[error("hook names no handler")]
    NoHandler,
}

/// Whose hook it is.
#[derive(Debug, Clone, Copy)]
pub struct HookTarget<'a> {
    pub pod: &'a Pod,
    pub container: &'a Container,
    pub container_id: &'a str,
    pub pod_ip: Option<IpAddr>,
}

/// Runs one hook to its end, or to the deadline. An HTTP answer counts as success whatever its status: the server was
/// told.
pub async fn run(
    cri: &Cri,
    target: HookTarget<'_>,
    handler: &LifecycleHandler,
    deadline: Duration,
) -> Result<(), HookError> {
    let hook = handle(cri, target, handler, deadline);
    tokio::time::timeout(deadline, hook).await.unwrap_or(Err(HookError::Deadline(deadline)))
}

async fn handle(
    cri: &Cri,
    target: HookTarget<'_>,
    handler: &LifecycleHandler,
    deadline: Duration,
) -> Result<(), HookError> {
    let HookTarget { pod, container, container_id, pod_ip } = target;
    if let Some(action) = &handler.exec {
        let words = action.command.as_deref().unwrap_or_default();
        let command = words.join(" ");
        return match exec::run(cri, container_id, words, deadline).await {
            Ended::Exit { code: 0, .. } => Ok(()),
            Ended::Exit { code, output } => Err(HookError::Exit { command, code, output }),
            Ended::TimedOut => Err(HookError::Deadline(deadline)),
            Ended::Error { message } => Err(HookError::Exec { command, message }),
        };
    }
    if let Some(action) = &handler.http_get {
        let mut action = action.clone();
        if matches!(&action.port, IntOrString::String(name) if name.is_empty()) {
            let secure = action.scheme.as_deref() == Some("HTTPS");
            action.port = IntOrString::Int(if secure { 443 } else { 80 });
        }
        let target = HttpTarget::new(&action, container, pod_ip)?;
        return http_get(pod, target).await;
    }
    if let Some(action) = &handler.sleep {
        tokio::time::sleep(Duration::from_secs(u64::try_from(action.seconds).unwrap_or(0))).await;
        return Ok(());
    }
    Err(if handler.tcp_socket.is_some() { HookError::TcpSocket } else { HookError::NoHandler })
}

async fn http_get(pod: &Pod, target: HttpTarget) -> Result<(), HookError> {
    let failed = |target: &HttpTarget, error: HttpError| HookError::Http {
        url: target.url(),
        cause: error.to_string(),
    };
    match http_client::get(&target, AGENT).await {
        Ok(_) => Ok(()),
        // Hooks were once always plain, whatever they said; servers have come to rely on it.
        Err(HttpError::NotTls) => {
            let (namespace, name) = (crate::podspec::namespace(pod), crate::podspec::pod_name(pod));
            tracing::warn!(namespace, pod = name, url = target.url(), "lifecycle hook falls back to HTTP");
            // Credentials meant for a secure connection do not go over another one.
            let headers =
                target.headers.iter().filter(|(name, _)| !name.eq_ignore_ascii_case("authorization"));
            let headers = headers.cloned().collect();
            let plain = HttpTarget { secure: false, headers, ..target };
            http_client::get(&plain, AGENT).await.map(drop).map_err(|error| failed(&plain, error))
        }
        Err(error) => Err(failed(&target, error)),
    }
}

#[cfg(test)]
mod tests;
