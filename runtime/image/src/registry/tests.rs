//! The client against a small server that misbehaves on purpose.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::*;
use crate::digest::Digest;
use crate::error::ImageError;
use crate::reference::Reference;
use crate::{Auth, ErrorKind};

const QUICK: Timing = Timing {
    response: Duration::from_secs(5),
    stall: Duration::from_millis(100),
    first_delay: Duration::from_millis(1),
    longest_delay: Duration::from_millis(5),
    attempts: 3,
    connect_attempts: 1,
};

enum Reply {
    Whole(String, Vec<u8>),
    /// Announces all of the body, sends this much, and closes.
    Cut(String, Vec<u8>, usize),
    /// Announces all of the body, sends this much, and goes silent.
    Hang(String, Vec<u8>, usize),
}

fn ok(body: &[u8]) -> Reply {
    Reply::Whole("200 OK".into(), body.to_vec())
}

struct Server {
    address: String,
    /// Heads and bodies of all requests.
    seen: Arc<Mutex<Vec<String>>>,
}

/// Serves one request per connection; `answer` gets the request's head with its body behind it.
async fn serve(answer: impl Fn(&str) -> Reply + Send + Sync + 'static) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (log, answer) = (Arc::clone(&seen), Arc::new(answer));
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
            tokio::spawn(async move {
                let mut request = Vec::new();
                let mut buffer = [0u8; 4096];
                loop {
                    let got = socket.read(&mut buffer).await.unwrap_or(0);
                    request.extend_from_slice(&buffer[..got]);
                    let text = String::from_utf8_lossy(&request).to_ascii_lowercase();
                    let length = text
                        .split("content-length: ")
                        .nth(1)
                        .and_then(|rest| rest.lines().next()?.parse().ok());
                    let complete = text
                        .find("\r\n\r\n")
                        .is_some_and(|end| request.len() >= end + 4 + length.unwrap_or(0));
                    if got == 0 || complete {
                        break;
                    }
                }
                let request = String::from_utf8_lossy(&request).into_owned();
                log.lock().unwrap().push(request.clone());
                let (head, body, send, hang) = match answer(&request) {
                    Reply::Whole(head, body) => (head, body.clone(), body.len(), false),
                    Reply::Cut(head, body, send) => (head, body, send, false),
                    Reply::Hang(head, body, send) => (head, body, send, true),
                };
                let head =
                    format!("HTTP/1.1 {head}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
                let _ = socket.write_all(head.as_bytes()).await;
                let _ = socket.write_all(&body[..send]).await;
                if hang {
                    tokio::time::sleep(Duration::from_secs(30)).await;
                }
            });
        }
    });
    Server { address, seen }
}

fn session(server: &Server, auth: Option<&Auth>) -> Session {
    let reference = Reference::parse(&format!("{}/repo/app:v1", server.address)).unwrap();
    Session::new(&reference, None, auth, QUICK).unwrap()
}

fn header<'a>(request: &'a str, name: &str) -> Option<&'a str> {
    request.lines().find_map(|line| {
        let (key, value) = line.split_once(": ")?;
        key.eq_ignore_ascii_case(name).then_some(value)
    })
}

async fn read(stream: &mut BlobStream<'_>) -> Result<Vec<u8>, ImageError> {
    let mut whole = Vec::new();
    while let Some(piece) = stream.next().await? {
        whole.extend_from_slice(&piece);
    }
    Ok(whole)
}

fn user() -> Auth {
    Auth { username: "user".into(), password: "geheim".into(), ..Auth::default() }
}

/// A registry that wants token number `valid`, with a token server beside it.
async fn token_registry(valid: usize, field: &'static str) -> Server {
    let issued = AtomicUsize::new(0);
    serve(move |request| {
        let target = request.split(' ').nth(1).unwrap();
        let host = header(request, "host").unwrap();
        if target.starts_with("/token") {
            let number = issued.fetch_add(1, Ordering::SeqCst) + 1;
            return ok(format!(r#"{{"{field}":"t{number}","expires_in":300}}"#).as_bytes());
        }
        if header(request, "authorization") == Some(&format!("Bearer t{valid}")) {
            return ok(b"manifest");
        }
        let challenge = format!(
            "401 Unauthorized\r\nWWW-Authenticate: Bearer realm=\"http://{host}/token\",service=\"reg\",scope=\"repository:repo/app:pull\""
        );
        Reply::Whole(challenge, Vec::new())
    })
    .await
}

#[tokio::test]
async fn a_token_is_fetched_with_the_credentials_and_reused() {
    for (field, auth, expected) in
        [("token", None, None), ("access_token", Some(user()), Some("Basic dXNlcjpnZWhlaW0="))]
    {
        let server = token_registry(1, field).await;
        let session = session(&server, auth.as_ref());
        session.manifest().await.unwrap();
        session.manifest().await.unwrap();
        let seen = server.seen.lock().unwrap();
        let tokens: Vec<_> = seen.iter().filter(|request| request.contains(" /token")).collect();
        assert_eq!(tokens.len(), 1);
        assert!(
            tokens[0].starts_with("GET /token?scope=repository%3Arepo%2Fapp%3Apull&service=reg "),
            "{}",
            tokens[0]
        );
        assert_eq!(header(tokens[0], "authorization"), expected);
        assert_eq!(seen.len(), 4);
    }
}

#[tokio::test]
async fn an_expired_token_is_renewed_once_and_a_refused_one_is_an_error() {
    let server = token_registry(2, "token").await;
    let session_1 = session(&server, None);
    // The first token is refused: that is an answer, not a reason to ask for ever.
    assert!(session_1.manifest().await.unwrap_err().is_unauthorized());
    let server = token_registry(2, "token").await;
    let session_2 = session(&server, None);
    let _ = session_2.manifest().await;
    session_2.manifest().await.unwrap();
}

#[tokio::test]
async fn an_identity_token_is_exchanged_by_post_and_a_registry_token_sent_as_it_is() {
    let server = token_registry(1, "access_token").await;
    let auth = Auth { identity_token: "a&b".into(), ..Auth::default() };
    session(&server, Some(&auth)).manifest().await.unwrap();
    let form = server.seen.lock().unwrap().iter().find(|r| r.starts_with("POST /token")).cloned().unwrap();
    assert!(
        form.contains("grant_type=refresh_token&refresh_token=a%26b&service=reg&scope=repository"),
        "{form}"
    );
    let server = token_registry(7, "token").await;
    let auth = Auth { registry_token: "t7".into(), ..Auth::default() };
    session(&server, Some(&auth)).manifest().await.unwrap();
    assert_eq!(server.seen.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_broken_or_stalled_download_is_resumed_where_it_stopped() {
    for ignores_range in [false, true] {
        let content: Vec<u8> = (0..200_000u32).map(|n| n.to_le_bytes()[0]).collect();
        let body = content.clone();
        let count = AtomicUsize::new(0);
        let server = serve(move |request| {
            let offset =
                header(request, "range").map(|range| range[6..range.len() - 1].parse::<usize>().unwrap());
            let (status, rest) = match offset {
                Some(offset) if !ignores_range => {
                    let range = format!("206 Partial Content\r\nContent-Range: bytes {offset}-199999/200000");
                    (range, body[offset..].to_vec())
                }
                _ => ("200 OK".to_owned(), body.clone()),
            };
            match count.fetch_add(1, Ordering::SeqCst) {
                0 => Reply::Cut(status, rest, 70_000),
                1 => Reply::Hang(status, rest, 90_000),
                _ => Reply::Whole(status, rest),
            }
        })
        .await;
        let session = session(&server, None);
        let mut stream = BlobStream::new(&session, &Digest::of(&content), content.len() as u64);
        assert_eq!(read(&mut stream).await.unwrap(), content);
        assert_eq!(server.seen.lock().unwrap().len(), 3);
    }
}

#[tokio::test]
async fn a_download_that_never_moves_ends_in_registry_unavailable() {
    let server = serve(|_| Reply::Hang("200 OK".into(), vec![0; 10], 0)).await;
    let session = session(&server, None);
    let error = read(&mut BlobStream::new(&session, &Digest::of(b"x"), 10)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::RegistryUnavailable);
    assert!(error.to_string().contains("no data for"), "{error}");
}

#[tokio::test]
async fn redirects_are_followed_without_the_secrets() {
    let store = serve(|_| ok(b"blob")).await;
    let target = format!("http://localhost:{}/bucket/x?sig=1", store.address.rsplit(':').next().unwrap());
    let registry =
        serve(move |_| Reply::Whole(format!("307 Temporary Redirect\r\nLocation: {target}"), Vec::new()))
            .await;
    let auth = Auth { registry_token: "secret".into(), ..Auth::default() };
    let session = session(&registry, Some(&auth));
    assert_eq!(&session.small_blob(&Digest::of(b"blob"), 100).await.unwrap()[..], b"blob");
    assert_eq!(header(&registry.seen.lock().unwrap()[0], "authorization"), Some("Bearer secret"));
    let seen = store.seen.lock().unwrap();
    assert!(seen[0].starts_with("GET /bucket/x?sig=1 "));
    assert_eq!(header(&seen[0], "authorization"), None);
}

#[tokio::test]
async fn overload_is_waited_out_and_then_reported() {
    let count = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&count);
    let server = serve(move |_| match counter.fetch_add(1, Ordering::SeqCst) {
        0 => Reply::Whole("429 Too Many Requests".into(), Vec::new()),
        1 => Reply::Whole("503 Service Unavailable".into(), Vec::new()),
        _ => ok(b"{}"),
    })
    .await;
    session(&server, None).manifest().await.unwrap();
    let server = serve(|_| Reply::Whole("500 Internal Server Error".into(), Vec::new())).await;
    let error = session(&server, None).manifest().await.unwrap_err();
    assert!(error.is_registry_unavailable() && error.to_string().contains("500"), "{error}");
}

#[tokio::test]
async fn wrong_bytes_and_too_many_of_them_are_refused() {
    let server = serve(|_| ok(b"other")).await;
    let session_1 = session(&server, None);
    let error = session_1.small_blob(&Digest::of(b"blob"), 100).await.unwrap_err();
    assert!(matches!(error, ImageError::DigestMismatch { .. }), "{error}");
    let error = session_1.small_blob(&Digest::of(b"other"), 3).await.unwrap_err();
    assert!(matches!(error, ImageError::InvalidResponse { .. }), "{error}");
}
