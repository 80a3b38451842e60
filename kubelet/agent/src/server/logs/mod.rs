//! `/containerLogs`: a container's log file as `kubectl logs` shows it.

mod line;
mod options;
mod reader;

pub(super) use options::{LogOptions, OptionsError};

use bytes::Bytes;
use line::Shaper;
use reader::LogFile;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::mpsc;

/// How often a followed container is asked whether it still runs when its log is silent.
const LIVENESS: Duration = Duration::from_millis(500);

/// Sends the log to `output` until its end, or with `follow` until `running` says the container has ended and everything
/// was sent. A receiver that goes ends it at once.
pub(super) async fn send<F: Future<Output = bool>>(
    path: PathBuf,
    options: LogOptions,
    output: mpsc::Sender<io::Result<Bytes>>,
    running: impl Fn() -> F,
) {
    if let Err(error) = copy(path, &options, &output, running).await {
        // Breaks the response off, so that the client sees that something is missing.
        let _gone = output.send(Err(error)).await;
    }
}

async fn copy<F: Future<Output = bool>>(
    path: PathBuf,
    options: &LogOptions,
    output: &mpsc::Sender<io::Result<Bytes>>,
    running: impl Fn() -> F,
) -> io::Result<()> {
    let mut file = LogFile::open(path, options.tail_lines).await?;
    let mut shaper = Shaper::new(options);
    let mut over = false;
    loop {
        while let Some(lines) = file.read().await? {
            let shaped = shaper.shape(&lines);
            if !shaped.is_empty() && output.send(Ok(shaped)).await.is_err() {
                return Ok(());
            }
            if shaper.is_full() {
                return Ok(());
            }
        }
        if over || !options.follow {
            return Ok(());
        }
        tokio::select! {
            () = output.closed() => return Ok(()),
            changed = tokio::time::timeout(LIVENESS, file.changed()) => {
                if let Ok(changed) = changed {
                    changed?;
                } else {
                    // Everything written before this answer is read once more before the end.
                    over = !running().await;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn line(number: usize) -> String {
        format!("2026-01-01T00:00:0{}.000000000Z stdout F line {number}\n", number % 10)
    }

    async fn collect(mut receiver: mpsc::Receiver<io::Result<Bytes>>) -> String {
        let mut text = String::new();
        while let Some(piece) = receiver.recv().await {
            text.push_str(std::str::from_utf8(&piece.unwrap()).unwrap());
        }
        text
    }

    #[tokio::test]
    async fn following_goes_through_a_rotation_and_ends_with_the_container() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.log");
        std::fs::write(&path, line(0)).unwrap();
        let running = Arc::new(AtomicBool::new(true));
        let (sender, receiver) = mpsc::channel(4);
        let options = LogOptions { follow: true, ..LogOptions::default() };
        let seen = running.clone();
        let sending = tokio::spawn(send(path.clone(), options, sender, move || {
            let running = seen.load(Ordering::SeqCst);
            async move { running }
        }));
        let reading = tokio::spawn(collect(receiver));
        // The reader has the first file open before anything happens to it.
        tokio::time::sleep(Duration::from_millis(30)).await;
        let mut file = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
        for number in 1..50 {
            file.write_all(line(number).as_bytes()).unwrap();
            if number == 20 {
                std::fs::rename(&path, folder.path().join("0.log.1")).unwrap();
                file.write_all(b"2026-01-01T00:00:01Z stdout F late\n").unwrap();
                tokio::time::sleep(Duration::from_millis(30)).await;
                file = std::fs::File::create(&path).unwrap();
            }
        }
        running.store(false, Ordering::SeqCst);
        sending.await.unwrap();
        let mut expected: Vec<String> = (0..50).map(|n| format!("line {n}")).collect();
        expected.insert(21, "late".to_owned());
        assert_eq!(reading.await.unwrap().lines().collect::<Vec<_>>(), expected);
    }

    #[tokio::test]
    async fn a_client_that_goes_ends_the_following() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.log");
        std::fs::write(&path, line(0)).unwrap();
        let (sender, mut receiver) = mpsc::channel(4);
        let options = LogOptions { follow: true, ..LogOptions::default() };
        let sending = tokio::spawn(send(path, options, sender, || async { true }));
        receiver.recv().await.unwrap().unwrap();
        drop(receiver);
        tokio::time::timeout(Duration::from_secs(5), sending).await.unwrap().unwrap();
    }
}
