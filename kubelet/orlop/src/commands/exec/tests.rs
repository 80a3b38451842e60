use super::*;
use orlop_cri::streaming::{AsyncReadWrite, StreamError, StreamIo, StreamServer, StreamTarget};
use orlop_proto::cri::AttachRequest;
use std::io::PipeReader;
use std::sync::Arc;
use std::time::Duration;
use tonic::async_trait;

/// Runs no containers: the command's name says what it does.
struct Actor;

#[async_trait]
impl StreamTarget for Actor {
    async fn exec(&self, request: ExecRequest, io: StreamIo) -> Result<i32, StreamError> {
        let mut stdout = io.stdout.unwrap();
        match request.cmd[0].as_str() {
            "cat" => {
                tokio::io::copy(&mut io.stdin.unwrap(), &mut stdout).await.unwrap();
                Ok(0)
            }
            "both" => {
                stdout.write_all(b"out").await.unwrap();
                io.stderr.unwrap().write_all(b"err").await.unwrap();
                Ok(7)
            }
            "size" => {
                assert!(io.stderr.is_none());
                let mut sizes = io.resize.unwrap();
                for _ in 0..2 {
                    let (columns, rows) = sizes.recv().await.unwrap();
                    stdout.write_all(format!("{columns}x{rows} ").as_bytes()).await.unwrap();
                }
                Ok(0)
            }
            "yes" => loop {
                if stdout.write_all(&[b'y'; 4096]).await.is_err() {
                    std::future::pending::<()>().await;
                }
            },
            "hang" => std::future::pending().await,
            name => Err(StreamError::NotFound { what: "program", id: name.to_owned() }),
        }
    }
    async fn attach(&self, _: AttachRequest, _: StreamIo) -> Result<(), StreamError> {
        Err(StreamError::ShuttingDown)
    }
    async fn port_forward(&self, _: &str, _: u16, _: Box<dyn AsyncReadWrite>) -> Result<(), StreamError> {
        Err(StreamError::ShuttingDown)
    }
}

/// The other side of the local ends.
struct Person {
    stdin: mpsc::Sender<Vec<u8>>,
    sizes: mpsc::Sender<(u16, u16)>,
    stdout: PipeReader,
    stderr: PipeReader,
}

impl Person {
    /// What was written until the session closed its end.
    fn saw(mut self) -> (String, String) {
        let (mut out, mut err) = (String::new(), String::new());
        self.stdout.read_to_string(&mut out).unwrap();
        self.stderr.read_to_string(&mut err).unwrap();
        (out, err)
    }
}

fn person(options: Options) -> (Person, LocalEnds) {
    let (stdin, input) = mpsc::channel(4);
    let (sizes, resizes) = mpsc::channel(4);
    let (stdout, output) = io::pipe().unwrap();
    let (stderr, errors) = io::pipe().unwrap();
    let local = LocalEnds {
        stdin: options.stdin.then_some(input),
        stdout: Output::on_thread(output).unwrap(),
        stderr: Output::on_thread(errors).unwrap(),
        sizes: options.tty.then_some(resizes),
    };
    (Person { stdin, sizes, stdout, stderr }, local)
}

async fn server() -> StreamServer {
    StreamServer::start("127.0.0.1:0".parse().unwrap(), Arc::new(Actor)).await.unwrap()
}

async fn open(server: &StreamServer, command: &str, options: Options) -> Streams {
    let Options { stdin, tty } = options;
    let request = ExecRequest {
        cmd: vec![command.to_owned()],
        stdin,
        tty,
        stdout: true,
        stderr: !tty,
        ..ExecRequest::default()
    };
    Streams::open(&server.exec_url(request).unwrap(), options).await.unwrap()
}

async fn ending(session: impl Future<Output = Result<i32>>) -> Result<i32> {
    tokio::time::timeout(Duration::from_secs(10), session).await.unwrap()
}

const PLAIN: Options = Options { stdin: false, tty: false };
const INPUT: Options = Options { stdin: true, tty: false };
const TERMINAL: Options = Options { stdin: true, tty: true };

#[test]
fn exit_codes_are_read_from_the_status() -> Result<()> {
    let failure = r#"{"metadata":{},"status":"Failure","message":"command terminated with exit code 3",
        "reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"3"}]}}"#;
    assert_eq!(exit_code(failure.as_bytes())?, 3);
    assert_eq!(exit_code(br#"{"metadata":{},"status":"Success"}"#)?, 0);
    Ok(())
}

#[test]
fn an_end_without_exit_code_is_an_error_that_says_why() {
    let text = |status: &str| exit_code(status.as_bytes()).unwrap_err().to_string();
    let internal = r#"{"status":"Failure","reason":"InternalError","message":"no such file","code":500}"#;
    assert_eq!(text(internal), "the command did not run to its end: no such file");
    assert_eq!(text(""), "the connection broke before the command ended");
    assert_eq!(text("oops\n"), "understand how the command ended: oops");
    let odd = r#"{"status":"Failure","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"x"}]}}"#;
    assert_eq!(text(odd), "understand the exit code \"x\"");
}

#[tokio::test]
async fn input_goes_in_and_output_comes_out() {
    let server = server().await;
    let streams = open(&server, "cat", INPUT).await;
    let (person, local) = person(INPUT);
    let typing = async {
        person.stdin.send(b"hello ".to_vec()).await.unwrap();
        person.stdin.send(vec![b'.'; 100_000]).await.unwrap();
        let Person { stdin, sizes, mut stdout, stderr } = person;
        drop((stdin, sizes, stderr));
        // More than a pipe holds: somebody has to read meanwhile.
        tokio::task::spawn_blocking(move || {
            let mut out = Vec::new();
            stdout.read_to_end(&mut out).map(|_| out)
        })
        .await
        .unwrap()
        .unwrap()
    };
    let (code, out) = tokio::join!(ending(streams.carry(local)), typing);
    assert_eq!(code.unwrap(), 0);
    assert!(out.starts_with(b"hello .") && out.len() == 100_006, "{} bytes", out.len());
}

#[tokio::test]
async fn the_session_ends_with_the_command_although_input_stays_open() {
    let server = server().await;
    let streams = open(&server, "both", INPUT).await;
    let (person, local) = person(INPUT);
    assert_eq!(ending(streams.carry(local)).await.unwrap(), 7);
    assert_eq!(person.saw(), ("out".to_owned(), "err".to_owned()));
}

#[tokio::test]
async fn a_terminal_has_one_output_and_learns_its_sizes() {
    let server = server().await;
    let streams = open(&server, "size", TERMINAL).await;
    let (person, local) = person(TERMINAL);
    person.sizes.send((80, 24)).await.unwrap();
    person.sizes.send((120, 40)).await.unwrap();
    assert_eq!(ending(streams.carry(local)).await.unwrap(), 0);
    assert_eq!(person.saw(), ("80x24 120x40 ".to_owned(), String::new()));
}

#[tokio::test]
async fn a_command_that_cannot_run_and_a_broken_connection_are_errors() {
    let server = server().await;
    let streams = open(&server, "nonsense", PLAIN).await;
    let error = ending(streams.carry(person(PLAIN).1)).await.unwrap_err();
    assert_eq!(error.to_string(), "the command did not run to its end: program nonsense does not exist");
    let streams = open(&server, "hang", PLAIN).await;
    let (_person, local) = person(PLAIN);
    let stopped = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        drop(server);
    };
    let (error, ()) = tokio::join!(ending(streams.carry(local)), stopped);
    assert_eq!(error.unwrap_err().to_string(), "the connection broke before the command ended");
}

#[tokio::test]
async fn output_that_nobody_reads_any_more_ends_the_session() {
    let server = server().await;
    let streams = open(&server, "yes", PLAIN).await;
    let (person, local) = person(PLAIN);
    drop(person);
    let error = ending(streams.carry(local)).await.unwrap_err();
    assert_eq!(error.to_string(), "write the command's output");
}

#[test]
fn input_is_read_piece_by_piece_until_its_end() -> Result<()> {
    let (reader, mut writer) = io::pipe()?;
    let mut pieces = read_on_thread(reader)?;
    writer.write_all(b"one")?;
    assert_eq!(pieces.blocking_recv().as_deref(), Some(b"one".as_slice()));
    drop(writer);
    assert_eq!(pieces.blocking_recv(), None);
    Ok(())
}
