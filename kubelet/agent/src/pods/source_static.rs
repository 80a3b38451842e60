//! Static pods from a directory of manifests, or from one manifest. inotify tells at once, a slow look is the safety net.
//!
//! A file that cannot be used concerns nobody else. If a usable pod was read from it before, that one keeps running: a
//! half-written file must not take a control plane down.

use super::manifest::{self, ManifestError};
use futures_util::StreamExt;
use inotify::{Inotify, WatchMask};
use k8s_openapi::api::core::v1::Pod;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// What is known of one file.
#[derive(Debug, Clone, Default, PartialEq)]
struct Known {
    bytes: Vec<u8>,
    pod: Option<Arc<Pod>>,
    problem: Option<ManifestError>,
}

/// Reads manifests again and again and remembers what it read.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    node_name: String,
    files: BTreeMap<PathBuf, Known>,
}

impl Reader {
    #[must_use]
    pub fn new(path: &Path, node_name: &str) -> Self {
        Self { path: path.to_owned(), node_name: node_name.to_owned(), files: BTreeMap::new() }
    }

    /// Looks at all files. The pods are those of good files and the last good ones of files that went bad; the problems
    /// are those that are new since the last look.
    pub fn read(&mut self) -> (Vec<Arc<Pod>>, Vec<ManifestError>) {
        let mut new_problems = Vec::new();
        let paths = match list(&self.path) {
            Ok(paths) => paths,
            // A directory that cannot be read says nothing about its files.
            Err(cause) => {
                let problem = ManifestError::Unreadable { file: self.path.clone(), cause: cause.to_string() };
                let known = self.files.entry(PathBuf::new()).or_default();
                if known.problem.as_ref() != Some(&problem) {
                    known.problem = Some(problem.clone());
                    new_problems.push(problem);
                }
                return (self.pods(), new_problems);
            }
        };
        self.files.retain(|path, _| paths.contains(path));
        for path in paths {
            let known = self.files.entry(path.clone()).or_default();
            let read = read_file(&path);
            if matches!(&read, Ok(bytes) if *bytes == known.bytes && (known.pod.is_some() || known.problem.is_some()))
            {
                continue;
            }
            let parsed = read.and_then(|bytes| {
                known.bytes.clone_from(&bytes);
                manifest::parse(&path, &bytes, &self.node_name)
            });
            match parsed {
                Ok(pod) => {
                    known.pod = Some(Arc::new(pod));
                    known.problem = None;
                }
                Err(problem) if known.problem.as_ref() == Some(&problem) => {}
                Err(problem) => {
                    known.problem = Some(problem.clone());
                    new_problems.push(problem);
                }
            }
        }
        (self.pods(), new_problems)
    }

    fn pods(&self) -> Vec<Arc<Pod>> {
        let mut taken = std::collections::HashSet::new();
        // Two files with the same pod: the first one by name has it.
        self.files
            .values()
            .filter_map(|known| known.pod.clone())
            .filter(|pod| taken.insert(super::labels::full_name(pod)))
            .collect()
    }
}

fn list(path: &Path) -> std::io::Result<Vec<PathBuf>> {
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_dir() => {}
        Ok(_) => return Ok(vec![path.to_owned()]),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        let is_hidden = entry.file_name().to_string_lossy().starts_with('.');
        // A link is followed: configuration tools place manifests by links.
        if !is_hidden && std::fs::metadata(entry.path()).is_ok_and(|meta| meta.is_file()) {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

fn read_file(path: &Path) -> Result<Vec<u8>, ManifestError> {
    let unreadable = |cause: String| ManifestError::Unreadable { file: path.to_owned(), cause };
    let file = std::fs::File::open(path).map_err(|error| unreadable(error.to_string()))?;
    let mut bytes = Vec::new();
    file.take(manifest::LARGEST + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| unreadable(error.to_string()))?;
    if bytes.len() as u64 > manifest::LARGEST {
        return Err(unreadable(format!("it is larger than {} bytes", manifest::LARGEST)));
    }
    Ok(bytes)
}

/// Watches until the receiver is gone. Each message is the complete list.
pub async fn run(path: PathBuf, node_name: String, every: Duration, out: mpsc::Sender<Vec<Arc<Pod>>>) {
    let mut reader = Reader::new(&path, &node_name);
    let mut last: Option<Vec<Arc<Pod>>> = None;
    let mut wakeups = watch(&path);
    loop {
        let looked = tokio::task::spawn_blocking(move || {
            let found = reader.read();
            (reader, found)
        });
        let Ok((back, (pods, problems))) = looked.await else { return };
        reader = back;
        for problem in problems {
            tracing::error!("{problem}");
        }
        if last.as_ref() != Some(&pods) {
            last = Some(pods.clone());
            if out.send(pods).await.is_err() {
                return;
            }
        }
        let told = async {
            match wakeups.as_mut() {
                Some(stream) => drop(stream.next().await),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = told => tokio::time::sleep(Duration::from_millis(50)).await,
            () = tokio::time::sleep(every) => {}
            () = out.closed() => return,
        }
        if wakeups.is_none() {
            wakeups = watch(&path);
        }
    }
}

/// Wake-ups from the directory, or none where it cannot be watched (yet).
fn watch(path: &Path) -> Option<inotify::EventStream<[u8; 4096]>> {
    let directory = if path.is_dir() { path } else { path.parent()? };
    let inotify = Inotify::init().ok()?;
    let mask = WatchMask::CLOSE_WRITE
        | WatchMask::MOVED_TO
        | WatchMask::MOVED_FROM
        | WatchMask::DELETE
        | WatchMask::CREATE;
    inotify.watches().add(directory, mask).ok()?;
    inotify.into_event_stream([0; 4096]).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"NAME"},"spec":{"containers":[{"name":"c","image":"a"}]}}"#;

    fn names(pods: &[Arc<Pod>]) -> Vec<String> {
        pods.iter().map(|pod| pod.metadata.name.clone().unwrap()).collect()
    }

    #[test]
    fn a_bad_file_is_told_once_and_leaves_the_others_alone() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("a.json"), GOOD.replace("NAME", "a")).unwrap();
        std::fs::write(root.path().join("b.yaml"), "kind: [").unwrap();
        std::fs::write(root.path().join(".hidden"), "kind: [").unwrap();
        let mut reader = Reader::new(root.path(), "n");
        let (pods, problems) = reader.read();
        assert_eq!(names(&pods), ["a-n"]);
        assert_eq!(problems.len(), 1);
        assert!(problems[0].to_string().contains("b.yaml"));
        assert!(reader.read().1.is_empty());
    }

    #[test]
    fn a_file_that_goes_bad_keeps_its_pod_until_it_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("a.json");
        std::fs::write(&file, GOOD.replace("NAME", "a")).unwrap();
        let mut reader = Reader::new(root.path(), "n");
        let before = reader.read().0;
        std::fs::write(&file, "{").unwrap();
        let (pods, problems) = reader.read();
        assert_eq!(pods, before);
        assert_eq!(problems.len(), 1);
        std::fs::remove_file(&file).unwrap();
        assert!(reader.read().0.is_empty());
    }

    #[tokio::test]
    async fn a_new_file_is_noticed_without_waiting_for_the_slow_look() {
        let root = tempfile::tempdir().unwrap();
        let (out, mut inbox) = mpsc::channel(4);
        let task = tokio::spawn(run(root.path().into(), "n".into(), Duration::from_secs(3600), out));
        assert!(inbox.recv().await.unwrap().is_empty());
        std::fs::write(root.path().join("a.json"), GOOD.replace("NAME", "a")).unwrap();
        let seen = tokio::time::timeout(Duration::from_secs(5), inbox.recv()).await.unwrap().unwrap();
        assert_eq!(names(&seen), ["a-n"]);
        task.abort();
    }
}
