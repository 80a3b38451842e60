//! Signals by the names that images and the CRI use.

use orlop_proto::cri::Signal;

const SIGRTMIN: i32 = 34;
const SIGRTMAX: i32 = 64;

/// `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`, `RTMAX-1`.
pub(crate) fn parse(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return (1..=SIGRTMAX).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(rest) = bare.strip_prefix("RTMIN") {
        return real_time(SIGRTMIN, rest);
    }
    if let Some(rest) = bare.strip_prefix("RTMAX") {
        return real_time(SIGRTMAX, rest);
    }
    let canonical = match bare {
        "CLD" => "CHLD",
        "POLL" => "IO",
        "IOT" => "ABRT",
        other => other,
    };
    format!("SIG{canonical}").parse::<nix::sys::signal::Signal>().ok().map(|s| s as i32)
}

fn real_time(base: i32, offset: &str) -> Option<i32> {
    let offset = if offset.is_empty() { 0 } else { offset.parse::<i32>().ok()? };
    Some(base + offset).filter(|n| (SIGRTMIN..=SIGRTMAX).contains(n))
}

/// The number behind the CRI's enumeration, whose members are named like C's constants.
fn number(signal: Signal) -> Option<i32> {
    let name = signal.as_str_name().replace("PLUS", "+").replace("MINUS", "-");
    parse(&name)
}

/// The pod's word, then the image's, then SIGTERM.
pub(crate) fn stop_signal(pod: Signal, image: Option<&str>) -> i32 {
    let of_pod = if pod == Signal::RuntimeDefault { None } else { number(pod) };
    of_pod.or_else(|| image.and_then(parse)).unwrap_or(nix::sys::signal::Signal::SIGTERM as i32)
}

/// The CRI's member for a number; the first of several names.
pub(crate) fn to_cri(wanted: i32) -> Signal {
    (1..=65)
        .filter_map(|n| Signal::try_from(n).ok())
        .find(|signal| number(*signal) == Some(wanted))
        .unwrap_or(Signal::RuntimeDefault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_of_the_interface_has_its_number() {
        for value in 1..=65 {
            let signal = Signal::try_from(value).unwrap();
            let number = number(signal).unwrap_or_else(|| panic!("{}", signal.as_str_name()));
            assert_eq!(super::number(to_cri(number)), Some(number));
        }
        assert_eq!(number(Signal::Sigrtminplus15), Some(49));
        assert_eq!(number(Signal::Sigrtmaxminus14), Some(50));
        assert_eq!(number(Signal::Sigterm), Some(15));
    }

    #[test]
    fn images_name_signals_in_many_ways() {
        for (text, number) in [("SIGQUIT", 3), ("quit", 3), ("9", 9), ("SIGRTMIN+3", 37), ("RTMAX", 64)] {
            assert_eq!(parse(text), Some(number), "{text}");
        }
        for text in ["", "0", "65", "SIGFOO", "RTMIN+40", "RTMIN-1"] {
            assert_eq!(parse(text), None, "{text}");
        }
        assert_eq!(stop_signal(Signal::RuntimeDefault, Some("SIGINT")), 2);
        assert_eq!(stop_signal(Signal::Sigusr1, Some("SIGINT")), 10);
        assert_eq!(stop_signal(Signal::RuntimeDefault, Some("nonsense")), 15);
    }
}
