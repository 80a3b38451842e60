//! The client's side of a streaming URL, for `orlop exec` and for tests.

use super::spdy::{Connection, Role};
use http::header::{CONNECTION, HOST, UPGRADE};
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use std::io;
use tokio::net::TcpStream;

/// Why a streaming URL could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("{0} is no streaming address")]
    Address(String),
    #[error("cannot reach the streaming server at {address}")]
    Unreachable { address: String, source: io::Error },
    #[error("the streaming server does not speak as expected")]
    Http(#[from] hyper::Error),
    #[error("the streaming server refused: {status} {text}")]
    Refused { status: StatusCode, text: String },
    #[error("cannot begin the session")]
    Session(#[from] io::Error),
}

/// Upgrades a connection to `url` and begins a SPDY session that speaks `protocol`.
pub async fn connect(url: &str, protocol: &str) -> Result<Connection, ConnectError> {
    let uri: Uri = url.parse().map_err(|_| ConnectError::Address(url.to_owned()))?;
    let address = uri.authority().ok_or_else(|| ConnectError::Address(url.to_owned()))?.to_string();
    let stream = TcpStream::connect(&address)
        .await
        .map_err(|source| ConnectError::Unreachable { address: address.clone(), source })?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends by itself when the upgrade takes the connection over, or when it breaks, which the request then tells.
    tokio::spawn(connection.with_upgrades());
    let request = Request::post(uri.path())
        .header(HOST, &address)
        .header(CONNECTION, "Upgrade")
        .header(UPGRADE, "SPDY/3.1")
        .header("X-Stream-Protocol-Version", protocol)
        .body(Empty::<Bytes>::new())
        .map_err(|_| ConnectError::Address(url.to_owned()))?;
    let response = sender.send_request(request).await?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        return Err(ConnectError::Refused { status, text: String::from_utf8_lossy(&body).trim().to_owned() });
    }
    Ok(Connection::new(Role::Client, TokioIo::new(hyper::upgrade::on(response).await?))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::streaming::{AsyncReadWrite, StreamError, StreamIo, StreamServer, StreamTarget};
    use orlop_proto::cri::{AttachRequest, ExecRequest, PortForwardRequest};
    use std::sync::Arc;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tonic::async_trait;

    /// Runs no containers: says what it was asked.
    struct Echo;

    #[async_trait]
    impl StreamTarget for Echo {
        async fn exec(&self, request: ExecRequest, io: StreamIo) -> Result<i32, StreamError> {
            let (mut stdin, mut stdout) = (io.stdin.unwrap(), io.stdout.unwrap());
            if request.cmd == ["size"] {
                let (columns, rows) = io.resize.unwrap().recv().await.unwrap();
                stdout.write_all(format!("{columns}x{rows}").as_bytes()).await.unwrap();
                return Ok(0);
            }
            if request.cmd == ["hang"] {
                std::future::pending::<()>().await;
            }
            tokio::io::copy(&mut stdin, &mut stdout).await.unwrap();
            Ok(7)
        }
        async fn attach(&self, _: AttachRequest, _: StreamIo) -> Result<(), StreamError> {
            Err(StreamError::NotFound { what: "container", id: "x".into() })
        }
        async fn port_forward(
            &self,
            _: &str,
            port: u16,
            mut io: Box<dyn AsyncReadWrite>,
        ) -> Result<(), StreamError> {
            if port == 81 {
                return Err(StreamError::Failed {
                    operation: "reach port 81".into(),
                    reason: "refused".into(),
                });
            }
            let mut request = [0; 4];
            io.read_exact(&mut request).await.unwrap();
            io.write_all(&request).await.unwrap();
            io.shutdown().await.unwrap();
            Ok(())
        }
    }

    async fn server() -> StreamServer {
        StreamServer::start("127.0.0.1:0".parse().unwrap(), Arc::new(Echo)).await.unwrap()
    }

    fn exec(command: &str, tty: bool) -> ExecRequest {
        ExecRequest { cmd: vec![command.into()], stdin: true, stdout: true, tty, ..ExecRequest::default() }
    }

    fn kind(name: &str) -> Vec<(String, String)> {
        vec![("streamtype".into(), name.into())]
    }

    async fn read(mut stream: impl tokio::io::AsyncRead + Unpin) -> String {
        let mut text = String::new();
        tokio::time::timeout(Duration::from_secs(5), stream.read_to_string(&mut text))
            .await
            .unwrap()
            .unwrap();
        text
    }

    #[tokio::test]
    async fn a_command_gets_its_input_and_its_end_is_told() {
        let server = server().await;
        let url = server.exec_url(exec("cat", false)).unwrap();
        let connection = connect(&url, "v4.channel.k8s.io").await.unwrap();
        let error = connection.open(kind("error")).await.unwrap();
        let mut stdin = connection.open(kind("stdin")).await.unwrap();
        let stdout = connection.open(kind("stdout")).await.unwrap();
        stdin.write_all(b"hello").await.unwrap();
        stdin.shutdown().await.unwrap();
        assert_eq!(read(stdout).await, "hello");
        assert!(read(error).await.contains("\"message\":\"7\""));
        let again = connect(&url, "v4.channel.k8s.io").await;
        assert!(matches!(again, Err(ConnectError::Refused { status: StatusCode::NOT_FOUND, .. })));
    }

    #[tokio::test]
    async fn terminal_sizes_arrive() {
        let server = server().await;
        let connection =
            connect(&server.exec_url(exec("size", true)).unwrap(), "v4.channel.k8s.io").await.unwrap();
        let mut streams = Vec::new();
        for name in ["error", "stdin", "stdout", "resize"] {
            streams.push(connection.open(kind(name)).await.unwrap());
        }
        streams[3].write_all(b"{\"Width\":120,\"Height\":40}\n").await.unwrap();
        assert_eq!(read(&mut streams[2]).await, "120x40");
    }

    #[tokio::test]
    async fn what_goes_wrong_with_a_forwarded_port_is_told_and_others_go_on() {
        let server = server().await;
        let connection =
            connect(&server.port_forward_url(PortForwardRequest::default()).unwrap(), "portforward.k8s.io")
                .await
                .unwrap();
        let stream = async |kind: &str, port: u16, id: u16| {
            let headers = vec![
                ("streamtype".to_owned(), kind.to_owned()),
                ("port".to_owned(), port.to_string()),
                ("requestid".to_owned(), id.to_string()),
            ];
            connection.open(headers).await.unwrap()
        };
        let (refused, _data) = (stream("error", 81, 1).await, stream("data", 81, 1).await);
        let (error, mut data) = (stream("error", 80, 2).await, stream("data", 80, 2).await);
        assert_eq!(read(refused).await, "cannot reach port 81: refused");
        data.write_all(b"ping").await.unwrap();
        assert_eq!(read(&mut data).await, "ping");
        assert_eq!(read(error).await, "");
    }
}
