//! `/logs/`: the files below `/var/log`, read-only and never outside of it.

use super::body::{self, Body, text};
use http::{HeaderValue, Response, StatusCode};
use rustix::fs::{CWD, Dir, FileType, Mode, OFlags, ResolveFlags, openat, openat2};
use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;

const ROOT: &str = "/var/log";

enum Found {
    Folder(String),
    File(File),
}

pub(super) async fn answer(path: &str) -> Response<Body> {
    let path = path.trim_matches('/').to_owned();
    let found = tokio::task::spawn_blocking(move || find(Path::new(ROOT), &path)).await;
    match found {
        Ok(Ok(Found::Folder(page))) => {
            let mut response = text(StatusCode::OK, page);
            let html = HeaderValue::from_static("text/html; charset=utf-8");
            response.headers_mut().insert(http::header::CONTENT_TYPE, html);
            response
        }
        Ok(Ok(Found::File(file))) => send(file),
        Ok(Err(error)) if error.kind() == io::ErrorKind::PermissionDenied => {
            text(StatusCode::FORBIDDEN, "403 Forbidden")
        }
        _ => text(StatusCode::NOT_FOUND, "404 page not found"),
    }
}

/// Opens what `path` names, resolved as if `root` were the root: no link leads out.
fn find(root: &Path, path: &str) -> io::Result<Found> {
    let root = openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let path = if path.is_empty() { "." } else { path };
    // A pipe would make the open wait for a writer.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let opened: OwnedFd = openat2(&root, path, flags, Mode::empty(), resolve)?;
    match FileType::from_raw_mode(rustix::fs::fstat(&opened)?.st_mode) {
        FileType::Directory => Ok(Found::Folder(page(&opened)?)),
        FileType::RegularFile => Ok(Found::File(File::from(opened))),
        _ => Err(io::ErrorKind::NotFound.into()),
    }
}

fn page(folder: &OwnedFd) -> io::Result<String> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let mut name = entry.file_name().to_string_lossy().into_owned();
        if name == "." || name == ".." {
            continue;
        }
        if entry.file_type() == FileType::Directory {
            name.push('/');
        }
        names.push(name);
    }
    names.sort();
    let mut page =
        String::from("<!doctype html>\n<meta name=\"viewport\" content=\"width=device-width\">\n<pre>\n");
    for name in names {
        let text = name.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&#34;");
        let link: String = form_urlencoded::byte_serialize(name.as_bytes()).collect();
        let link = link.replace("%2F", "/").replace('+', "%20");
        // Writing to a string cannot fail.
        let _never = writeln!(page, "<a href=\"{link}\">{text}</a>");
    }
    page.push_str("</pre>\n");
    Ok(page)
}

fn send(file: File) -> Response<Body> {
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(async move {
        let mut file = tokio::fs::File::from_std(file);
        loop {
            let mut chunk = bytes::BytesMut::with_capacity(64 << 10);
            let piece = match file.read_buf(&mut chunk).await {
                Ok(0) => return,
                Ok(_) => Ok(chunk.freeze()),
                Err(error) => Err(error),
            };
            let broken = piece.is_err();
            if sender.send(piece).await.is_err() || broken {
                return;
            }
        }
    });
    Response::new(body::stream(receiver))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn no_path_and_no_link_leads_out() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("log");
        std::fs::create_dir(&root).unwrap();
        std::fs::write(folder.path().join("secret"), "secret").unwrap();
        std::fs::write(root.join("a.log"), "text").unwrap();
        std::os::unix::fs::symlink("../secret", root.join("link")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", root.join("absolute")).unwrap();
        for path in ["../secret", "link", "absolute", "x/../../secret", "missing"] {
            assert!(find(&root, path).is_err(), "{path}");
        }
        let Found::File(mut file) = find(&root, "a.log").unwrap() else { panic!("a file") };
        let mut content = String::new();
        file.read_to_string(&mut content).unwrap();
        assert_eq!(content, "text");
        let Found::Folder(page) = find(&root, "").unwrap() else { panic!("a folder") };
        assert!(page.contains("<a href=\"a.log\">a.log</a>"), "{page}");
    }
}
