//! Columns of text, and durations as people say them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Prints rows under headings, each column as wide as its widest cell.
pub fn print(headings: &[&str], rows: &[Vec<String>]) {
    print!("{}", render(headings, rows));
}

fn render(headings: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        rows.iter().map(|row| row[column].chars().count()).chain([headings[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let line = |cells: &[String]| {
        let padded: Vec<String> =
            cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("{}\n", padded.join("   ").trim_end())
    };
    let headings: Vec<String> = headings.iter().map(|h| (*h).to_owned()).collect();
    std::iter::once(line(&headings)).chain(rows.iter().map(|row| line(row))).collect()
}

/// The time since a moment given in nanoseconds of the epoch.
pub fn age(nanoseconds: i64, now: SystemTime) -> String {
    let Ok(then) = u64::try_from(nanoseconds) else { return "unknown".to_owned() };
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    human(now.saturating_sub(Duration::from_nanos(then)))
}

fn human(duration: Duration) -> String {
    match duration.as_secs() {
        seconds @ 0..120 => format!("{seconds}s"),
        seconds @ 120..7200 => format!("{}m", seconds / 60),
        seconds @ 7200..172_800 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

/// Bytes with a unit, as `df -h` prints them.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut scaled = count;
    let mut rest = 0;
    while scaled >= 1024 && unit + 1 < UNITS.len() {
        rest = scaled % 1024 * 10 / 1024;
        scaled /= 1024;
        unit += 1;
    }
    if unit == 0 { format!("{scaled} B") } else { format!("{scaled}.{rest} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = vec![vec!["a".to_owned(), "long cell".to_owned()], vec!["bcd".to_owned(), String::new()]];
        assert_eq!(render(&["X", "Y"], &rows), "X     Y\na     long cell\nbcd\n");
    }

    #[test]
    fn ages_and_sizes_use_one_unit() {
        assert_eq!(human(Duration::from_secs(119)), "119s");
        assert_eq!(human(Duration::from_secs(7199)), "119m");
        assert_eq!(human(Duration::from_secs(200_000)), "2d");
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(3 << 30), "3.0 GiB");
    }
}
