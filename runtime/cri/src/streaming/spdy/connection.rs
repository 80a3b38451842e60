//! One SPDY connection: a reading task, a writing task, and a duplex pipe for each stream.
//!
//! A stream that nobody reads holds the reading task up and with it the whole connection, as with every peer of this
//! protocol: memory stays bounded, TCP pushes back.

use super::frame::{self, Control, Head};
use super::headers::{Decoder, Encoder, Headers};
use bytes::{Bytes, BytesMut};
use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, WriteHalf};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Bytes on their way in one direction of one stream.
const PIPE: usize = 64 << 10;
/// A data frame is never larger when we write it.
const CHUNK: usize = 32 << 10;
/// Open at once; port-forward uses two for each connection.
const MAX_STREAMS: usize = 512;

/// Which side numbers its streams how: clients odd, servers even.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Client,
    Server,
}

/// A stream of the connection: a byte pipe in each direction that can be shut down separately.
#[derive(Debug)]
pub struct Stream {
    pub headers: Headers,
    io: DuplexStream,
}

impl Stream {
    /// The value of a header, if it was sent.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// What the writing task is asked to send. Header blocks are compressed there, in the order they go out.
#[derive(Debug)]
enum Outgoing {
    Open { stream: u32, headers: Headers },
    Reply { stream: u32 },
    Data { stream: u32, bytes: Bytes, fin: bool },
    Reset { stream: u32, status: u32 },
    Ping { id: u32 },
}

/// A running connection. Dropping it closes everything at once; see [`Connection::finish`] for the way that loses nothing.
#[derive(Debug)]
pub struct Connection {
    accepted: mpsc::Receiver<Stream>,
    opener: mpsc::Sender<(Headers, DuplexStream)>,
    closed: CancellationToken,
    writer: Option<tokio::task::JoinHandle<()>>,
    _reader: AbortOnDropHandle<()>,
}

impl Connection {
    /// Takes over an upgraded connection.
    pub fn new<T: AsyncRead + AsyncWrite + Send + 'static>(role: Role, transport: T) -> io::Result<Self> {
        let (read, write) = tokio::io::split(transport);
        let (outgoing, commands) = mpsc::channel(64);
        let (accept, accepted) = mpsc::channel(16);
        let (opener, opening) = mpsc::channel(16);
        let closed = CancellationToken::new();
        let encoder = Encoder::new().map_err(io::Error::other)?;
        let writer = tokio::spawn(write_frames(write, encoder, commands));
        let reader = Reader {
            role,
            decoder: Decoder::new(),
            streams: HashMap::new(),
            last_peer_stream: 0,
            next_stream: if role == Role::Client { 1 } else { 2 },
            accept,
            outgoing,
        };
        let over = closed.clone();
        let reader = tokio::spawn(async move {
            // However reading ends, the streams end with it; a peer's mistake is nobody else's news.
            if let Err(error) = reader.run(read, opening).await {
                tracing::debug!(%error, "SPDY connection ended");
            }
            over.cancel();
        });
        Ok(Self { accepted, opener, closed, writer: Some(writer), _reader: AbortOnDropHandle::new(reader) })
    }

    /// The next stream the peer opens; none when it has gone.
    pub async fn accept(&mut self) -> Option<Stream> {
        self.accepted.recv().await
    }

    /// Opens a stream of our own. None when the peer has gone.
    pub async fn open(&self, headers: Headers) -> Option<Stream> {
        let (ours, theirs) = tokio::io::duplex(PIPE);
        self.opener.send((headers.clone(), theirs)).await.ok()?;
        Some(Stream { headers, io: ours })
    }

    /// Fires when the peer has gone.
    #[must_use]
    pub fn closed(&self) -> CancellationToken {
        self.closed.clone()
    }

    /// Lets what was written go out: waits until the peer, having read it all, hangs up, at most `patience`. There is no
    /// GOAWAY before that: peers take it as leave to stop reading.
    pub async fn finish(self, patience: std::time::Duration) {
        let _late = tokio::time::timeout(patience, self.closed.cancelled()).await;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(writer) = self.writer.take() {
            writer.abort();
        }
    }
}

/// What the reading task knows of a stream.
#[derive(Debug)]
struct Open {
    /// Where the peer's bytes go; gone once the peer has finished.
    to_user: Option<WriteHalf<DuplexStream>>,
    /// Carries our user's bytes to the writing task.
    _pump: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Reader {
    role: Role,
    decoder: Decoder,
    streams: HashMap<u32, Open>,
    last_peer_stream: u32,
    next_stream: u32,
    accept: mpsc::Sender<Stream>,
    outgoing: mpsc::Sender<Outgoing>,
}

impl Reader {
    async fn run<R: AsyncRead + Unpin>(
        mut self,
        mut read: R,
        mut opening: mpsc::Receiver<(Headers, DuplexStream)>,
    ) -> io::Result<()> {
        let mut head = [0; frame::HEAD];
        let mut filled = 0;
        loop {
            tokio::select! {
                // `read` into a position is safe to drop between calls, `read_exact` would not be.
                count = read.read(&mut head[filled..]) => match count? {
                    0 => return Ok(()),
                    count => filled += count,
                },
                Some((headers, io)) = opening.recv() => self.open(headers, io).await,
            }
            if filled == head.len() {
                filled = 0;
                match frame::parse_head(head).map_err(io::Error::other)? {
                    Head::Data { stream, fin, length } => self.data(&mut read, stream, fin, length).await?,
                    Head::Control { kind, fin, length } => {
                        let mut payload = BytesMut::zeroed(length);
                        read.read_exact(&mut payload).await?;
                        let control =
                            frame::parse_control(kind, fin, payload.freeze()).map_err(io::Error::other)?;
                        self.control(control).await?;
                    }
                }
            }
        }
    }

    async fn data<R: AsyncRead + Unpin>(
        &mut self,
        read: &mut R,
        stream: u32,
        fin: bool,
        length: usize,
    ) -> io::Result<()> {
        let mut left = length;
        let mut buffer = BytesMut::zeroed(left.min(CHUNK));
        while left > 0 {
            let piece = left.min(CHUNK);
            read.read_exact(&mut buffer[..piece]).await?;
            left -= piece;
            if let Some(to_user) = self.streams.get_mut(&stream).and_then(|open| open.to_user.as_mut())
                && to_user.write_all(&buffer[..piece]).await.is_err()
            {
                // The user reads no more; the rest of the stream is of no interest.
                self.finish_input(stream);
            }
        }
        if fin {
            self.finish_input(stream);
        } else if !self.streams.contains_key(&stream) && length > 0 {
            self.send(Outgoing::Reset { stream, status: frame::INVALID_STREAM }).await;
        }
        Ok(())
    }

    /// The peer writes no more to this stream. Dropping half a duplex pipe is not enough to end it.
    fn finish_input(&mut self, stream: u32) {
        if let Some(mut to_user) = self.streams.get_mut(&stream).and_then(|open| open.to_user.take()) {
            tokio::spawn(async move { to_user.shutdown().await });
        }
    }

    async fn control(&mut self, control: Control) -> io::Result<()> {
        match control {
            Control::SynStream { stream, fin, block } => {
                // Decoded even when refused: the compression carries state from block to block.
                let headers = self.decoder.decode(&block).map_err(io::Error::other)?;
                self.accept(stream, fin, headers).await;
            }
            Control::SynReply { stream, fin, block } => {
                self.decoder.decode(&block).map_err(io::Error::other)?;
                if fin {
                    self.finish_input(stream);
                }
            }
            Control::Reset { stream } => {
                self.finish_input(stream);
                self.streams.remove(&stream);
            }
            Control::Ping { id } => {
                let peers_own = (id % 2 == 1) == (self.role == Role::Server);
                if peers_own {
                    self.send(Outgoing::Ping { id }).await;
                }
            }
            Control::GoAway | Control::Ignored => {}
        }
        Ok(())
    }

    async fn accept(&mut self, stream: u32, fin: bool, headers: Headers) {
        let peers_parity = u32::from(self.role == Role::Server);
        if stream % 2 != peers_parity || stream <= self.last_peer_stream {
            return self.send(Outgoing::Reset { stream, status: frame::PROTOCOL_ERROR }).await;
        }
        self.last_peer_stream = stream;
        if self.streams.len() >= MAX_STREAMS {
            // Finished ones are forgotten only here, where it matters.
            self.streams.retain(|_, open| open.to_user.is_some() || !open._pump.is_finished());
        }
        if self.streams.len() >= MAX_STREAMS {
            return self.send(Outgoing::Reset { stream, status: frame::REFUSED_STREAM }).await;
        }
        let (ours, theirs) = tokio::io::duplex(PIPE);
        self.track(stream, theirs);
        self.send(Outgoing::Reply { stream }).await;
        if fin {
            self.finish_input(stream);
        }
        if self.accept.send(Stream { headers, io: ours }).await.is_err() {
            self.streams.remove(&stream);
            self.send(Outgoing::Reset { stream, status: frame::REFUSED_STREAM }).await;
        }
    }

    async fn open(&mut self, headers: Headers, io: DuplexStream) {
        let stream = self.next_stream;
        self.next_stream += 2;
        self.send(Outgoing::Open { stream, headers }).await;
        self.track(stream, io);
    }

    fn track(&mut self, stream: u32, io: DuplexStream) {
        let (from_user, to_user) = tokio::io::split(io);
        let pump = tokio::spawn(pump(stream, from_user, self.outgoing.clone()));
        self.streams.insert(stream, Open { to_user: Some(to_user), _pump: AbortOnDropHandle::new(pump) });
    }

    async fn send(&self, frame: Outgoing) {
        // The writing task ends only when the connection is broken, which reading notices by itself.
        let _gone = self.outgoing.send(frame).await;
    }
}

/// Carries what a stream's user writes to the writing task, and its end.
async fn pump<R: AsyncRead + Unpin>(stream: u32, mut from_user: R, outgoing: mpsc::Sender<Outgoing>) {
    let mut buffer = BytesMut::with_capacity(CHUNK);
    loop {
        let fin = !matches!(from_user.read_buf(&mut buffer).await, Ok(count) if count > 0);
        let bytes = buffer.split().freeze();
        if outgoing.send(Outgoing::Data { stream, bytes, fin }).await.is_err() || fin {
            return;
        }
        buffer.reserve(CHUNK);
    }
}

async fn write_frames<W: AsyncWrite + Unpin>(
    mut write: W,
    mut encoder: Encoder,
    mut commands: mpsc::Receiver<Outgoing>,
) {
    while let Some(command) = commands.recv().await {
        let written = match command {
            Outgoing::Data { stream, bytes, fin } => {
                let head = frame::data_head(stream, fin, bytes.len());
                write_all(&mut write, &head, &bytes).await
            }
            control => match encode(&mut encoder, control) {
                Ok(frame) => write.write_all(&frame).await,
                Err(error) => Err(io::Error::other(error)),
            },
        };
        let flushed = match written {
            Ok(()) if commands.is_empty() => write.flush().await,
            other => other,
        };
        if flushed.is_err() {
            return;
        }
    }
}

async fn write_all<W: AsyncWrite + Unpin>(write: &mut W, head: &[u8], bytes: &[u8]) -> io::Result<()> {
    write.write_all(head).await?;
    write.write_all(bytes).await
}

fn encode(encoder: &mut Encoder, command: Outgoing) -> Result<Bytes, super::headers::HeaderError> {
    Ok(match command {
        Outgoing::Open { stream, headers } => frame::syn_stream(stream, &encoder.encode(&headers)?),
        Outgoing::Reply { stream } => frame::syn_reply(stream, &encoder.encode(&Vec::new())?),
        Outgoing::Reset { stream, status } => frame::reset(stream, status),
        Outgoing::Ping { id } => frame::ping(id),
        Outgoing::Data { stream, bytes, fin } => {
            let mut frame = BytesMut::from(&frame::data_head(stream, fin, bytes.len())[..]);
            frame.extend_from_slice(&bytes);
            frame.freeze()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn pair() -> (Connection, Connection) {
        let (a, b) = tokio::io::duplex(4096);
        (Connection::new(Role::Client, a).unwrap(), Connection::new(Role::Server, b).unwrap())
    }

    fn named(name: &str) -> Headers {
        vec![("streamtype".to_owned(), name.to_owned())]
    }

    #[tokio::test]
    async fn bytes_go_both_ways_and_each_half_ends_by_itself() {
        let (client, mut server) = pair();
        let mut ours = client.open(named("data")).await.unwrap();
        let mut theirs = server.accept().await.unwrap();
        assert_eq!(theirs.header("streamtype"), Some("data"));
        let sent: Vec<u8> = (0..300_000u32).map(|i| i.to_le_bytes()[0]).collect();
        let copy = sent.clone();
        let writing = tokio::spawn(async move {
            ours.write_all(&copy).await.unwrap();
            ours.shutdown().await.unwrap();
            let mut answer = String::new();
            ours.read_to_string(&mut answer).await.unwrap();
            answer
        });
        let mut received = Vec::new();
        theirs.read_to_end(&mut received).await.unwrap();
        assert!(received == sent);
        theirs.write_all(b"thanks").await.unwrap();
        theirs.shutdown().await.unwrap();
        assert_eq!(writing.await.unwrap(), "thanks");
    }

    #[tokio::test]
    async fn a_peer_that_goes_ends_every_stream() {
        let (client, mut server) = pair();
        let _ours = client.open(named("stdin")).await.unwrap();
        let mut theirs = server.accept().await.unwrap();
        drop(client);
        let mut rest = Vec::new();
        theirs.read_to_end(&mut rest).await.unwrap();
        tokio::time::timeout(Duration::from_secs(5), server.closed().cancelled()).await.unwrap();
        assert!(server.accept().await.is_none());
    }

    #[tokio::test]
    async fn a_stream_that_is_not_read_does_not_lose_the_others_bytes() {
        let (client, mut server) = pair();
        let mut first = client.open(named("one")).await.unwrap();
        let mut second = client.open(named("two")).await.unwrap();
        drop(server.accept().await.unwrap());
        let mut theirs = server.accept().await.unwrap();
        // Nobody reads the first: its bytes are dropped, or refused once that has come round.
        let _refused = first.write_all(&[0; 200_000]).await;
        second.write_all(b"here").await.unwrap();
        second.shutdown().await.unwrap();
        let mut text = String::new();
        theirs.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "here");
    }

    #[tokio::test]
    async fn garbage_ends_the_connection_and_nothing_else() {
        let (mut raw, transport) = tokio::io::duplex(4096);
        let mut server = Connection::new(Role::Server, transport).unwrap();
        raw.write_all(&[0xff; 64]).await.unwrap();
        assert!(server.accept().await.is_none());
    }
}
