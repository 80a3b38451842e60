//! From bytes to records.

/// Longer lines are cut into partial records of this size; readers of the CRI format put them together again.
pub(super) const MAX_PIECE_BYTES: usize = 16 << 10;
/// `2026-11-21T10:00:00.123456789Z`.
const TIMESTAMP_BYTES: usize = 30;
/// Time, stream, tag, the blanks between them and the newline. Both stream names have six letters.
pub(super) const RECORD_OVERHEAD: usize = TIMESTAMP_BYTES + 1 + 6 + 1 + 1 + 1 + 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum StreamName {
    Stdout,
    Stderr,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    /// The record ends a line.
    Full,
    /// The line goes on in the next record of this stream.
    Partial,
}

/// Cuts one stream into lines, keeping an unfinished one (never more than a piece) until the rest arrives.
#[derive(Debug)]
pub struct Splitter {
    pending: Vec<u8>,
    trim_carriage_return: bool,
}

impl Splitter {
    pub fn new(trim_carriage_return: bool) -> Self {
        Self::restore(Vec::new(), trim_carriage_return)
    }

    pub fn restore(pending: Vec<u8>, trim_carriage_return: bool) -> Self {
        Self { pending, trim_carriage_return }
    }

    pub fn pending(&self) -> &[u8] {
        &self.pending
    }

    /// A line of exactly `limit` bytes is one full record: it is cut only when one more byte arrives.
    pub fn push(&mut self, mut bytes: &[u8], limit: usize, emit: &mut impl FnMut(&[u8], Tag)) {
        while !bytes.is_empty() {
            let newline = bytes.iter().position(|&b| b == b'\n');
            let mut line = &bytes[..newline.unwrap_or(bytes.len())];
            bytes = newline.map_or(&[], |at| &bytes[at + 1..]);
            while self.pending.len() + line.len() > limit {
                let (head, tail) = line.split_at(limit.saturating_sub(self.pending.len()));
                if self.pending.is_empty() {
                    emit(head, Tag::Partial);
                } else {
                    self.pending.extend_from_slice(head);
                    emit(&self.pending, Tag::Partial);
                    self.pending.clear();
                }
                line = tail;
            }
            if newline.is_none() {
                self.pending.extend_from_slice(line);
            } else if self.pending.is_empty() {
                emit(self.trimmed(line), Tag::Full);
            } else {
                self.pending.extend_from_slice(line);
                emit(self.trimmed(&self.pending), Tag::Full);
                // An idle container shall not hold the buffer of its longest line.
                self.pending = Vec::new();
            }
        }
    }

    pub fn flush(&mut self, emit: &mut impl FnMut(&[u8], Tag)) {
        if !self.pending.is_empty() {
            emit(&self.pending, Tag::Partial);
            self.pending = Vec::new();
        }
    }

    fn trimmed<'a>(&self, line: &'a [u8]) -> &'a [u8] {
        match line {
            [head @ .., b'\r'] if self.trim_carriage_return => head,
            _ => line,
        }
    }
}

pub(super) fn append_record(batch: &mut Vec<u8>, stamp: &str, stream: StreamName, tag: Tag, content: &[u8]) {
    batch.extend_from_slice(stamp.as_bytes());
    batch.extend_from_slice(match (stream, tag) {
        (StreamName::Stdout, Tag::Full) => b" stdout F ",
        (StreamName::Stdout, Tag::Partial) => b" stdout P ",
        (StreamName::Stderr, Tag::Full) => b" stderr F ",
        (StreamName::Stderr, Tag::Partial) => b" stderr P ",
    });
    batch.extend_from_slice(content);
    batch.push(b'\n');
}

struct Utc {
    year: i64,
    month: i64,
    day: i64,
    hour: i64,
    minute: i64,
    second: i64,
    nanosecond: i64,
}

/// The proleptic Gregorian date of a time in nanoseconds since the epoch; years start in March inside, so that the leap
/// day is the last of its year.
fn utc(nanoseconds: i64) -> Utc {
    let seconds = nanoseconds.div_euclid(1_000_000_000);
    let days = seconds.div_euclid(86_400) + 719_468;
    let of_day = seconds.rem_euclid(86_400);
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    Utc {
        year: year_of_era + era * 400 + i64::from(month <= 2),
        month,
        day: of_year - (153 * from_march + 2) / 5 + 1,
        hour: of_day / 3_600,
        minute: of_day / 60 % 60,
        second: of_day % 60,
        nanosecond: nanoseconds.rem_euclid(1_000_000_000),
    }
}

/// RFC 3339 with all nine digits, so that every record's head has the same length.
pub(super) fn timestamp(nanoseconds: i64) -> String {
    let Utc { year, month, day, hour, minute, second, nanosecond } = utc(nanoseconds);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanosecond:09}Z")
}

/// `20261121-100000`, as it stands in the names of rotated files.
pub fn compact_utc(nanoseconds: i64) -> String {
    let Utc { year, month, day, hour, minute, second, .. } = utc(nanoseconds);
    format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn times_are_written_as_the_calendar_has_them() {
        assert_eq!(timestamp(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(timestamp(951_782_400_000_000_001), "2000-02-29T00:00:00.000000001Z");
        assert_eq!(timestamp(1_795_255_200_123_456_789), "2026-11-21T10:00:00.123456789Z");
        assert_eq!(compact_utc(4_107_542_399_000_000_000), "21000228-235959");
        assert_eq!(timestamp(0).len(), TIMESTAMP_BYTES);
    }

    fn pieces(chunks: &[&[u8]], limit: usize, trim: bool) -> Vec<(Vec<u8>, Tag)> {
        let mut splitter = Splitter::new(trim);
        let mut out = Vec::new();
        for chunk in chunks {
            splitter.push(chunk, limit, &mut |piece, tag| out.push((piece.to_vec(), tag)));
        }
        splitter.flush(&mut |piece, tag| out.push((piece.to_vec(), tag)));
        out
    }

    #[test]
    fn a_line_of_exactly_one_piece_is_one_full_record() {
        assert_eq!(pieces(&[b"abcd\n"], 4, false), [(b"abcd".to_vec(), Tag::Full)]);
        assert_eq!(
            pieces(&[b"abcd", b"e\n"], 4, false),
            [(b"abcd".to_vec(), Tag::Partial), (b"e".to_vec(), Tag::Full)]
        );
    }

    #[test]
    fn a_terminals_carriage_return_goes_and_a_pipes_stays() {
        assert_eq!(pieces(&[b"a\r", b"\nb\r\n"], 100, true)[0].0, b"a");
        assert_eq!(pieces(&[b"a\r\n"], 100, false)[0].0, b"a\r");
    }

    #[test]
    fn an_unterminated_end_is_a_partial_record() {
        assert_eq!(
            pieces(&[b"a\nb"], 100, false),
            [(b"a".to_vec(), Tag::Full), (b"b".to_vec(), Tag::Partial)]
        );
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_chunks_can_be_put_together_again(
            chunks in proptest::collection::vec(
                proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), any::<u8>()], 0..60), 0..20),
            limit in 1_usize..40,
        ) {
            let borrowed: Vec<&[u8]> = chunks.iter().map(Vec::as_slice).collect();
            let mut joined = Vec::new();
            for (piece, tag) in pieces(&borrowed, limit, false) {
                prop_assert!(piece.len() <= limit);
                prop_assert!(!piece.contains(&b'\n'));
                joined.extend(piece);
                if tag == Tag::Full {
                    joined.push(b'\n');
                }
            }
            prop_assert_eq!(joined, chunks.concat());
        }

        #[test]
        fn every_record_head_has_the_same_length(now in 0_i64..i64::MAX, err in any::<bool>()) {
            let stream = if err { StreamName::Stderr } else { StreamName::Stdout };
            let mut batch = Vec::new();
            append_record(&mut batch, &timestamp(now), stream, Tag::Full, b"");
            prop_assert_eq!(batch.len(), RECORD_OVERHEAD);
        }
    }
}
