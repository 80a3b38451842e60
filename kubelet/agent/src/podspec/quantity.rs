//! Kubernetes quantities: `100m`, `1.5Gi`, `2e3`. Exact down to a nano unit; finer fractions round away from zero, and
//! magnitudes beyond 2^63-1 are clamped, as the API server does.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use std::fmt;
use std::ops::{Add, Sub};

const NANO: i128 = 1_000_000_000;
const MAX: i128 = (i64::MAX as i128) * NANO;
const NANO_DIGITS: usize = 9;

/// Text that is no quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot parse quantity {text:?}: {cause}")]
pub struct QuantityError {
    text: String,
    cause: &'static str,
}

/// A parsed quantity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Amount {
    nano: i128,
}

enum Scale {
    /// Multiply by two to this power.
    Binary(u32),
    /// Multiply by ten to this power.
    Decimal(i32),
}

impl Amount {
    pub const ZERO: Self = Self { nano: 0 };

    pub fn parse(text: &str) -> Result<Self, QuantityError> {
        let fail = |cause| QuantityError { text: text.to_owned(), cause };
        let (negative, rest) = match text.as_bytes().first() {
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            Some(_) => (false, text),
            None => return Err(fail("it is empty")),
        };
        let number = rest.bytes().take_while(|b| b.is_ascii_digit() || *b == b'.').count();
        let (number, suffix) = rest.split_at(number);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() {
            return Err(fail("it has no digits"));
        }
        if fraction.contains('.') {
            return Err(fail("it has two decimal points"));
        }
        let scale = parse_suffix(suffix).ok_or_else(|| fail("its suffix is unknown"))?;
        let nano = match scale {
            Scale::Binary(power) => magnitude(whole, fraction, 1i128 << power),
            Scale::Decimal(power) => {
                let (whole, fraction) = shift_point(whole, fraction, power);
                magnitude(&whole, &fraction, 1)
            }
        };
        Ok(Self { nano: if negative { -nano } else { nano } })
    }

    #[must_use]
    pub fn from_units(units: i64) -> Self {
        Self { nano: i128::from(units) * NANO }
    }

    #[must_use]
    pub fn from_milli(milli: i64) -> Self {
        Self { nano: i128::from(milli) * (NANO / 1000) }
    }

    /// Whole units, rounded up.
    #[must_use]
    pub fn value(self) -> i64 {
        saturate(div_ceil(self.nano, NANO))
    }

    /// Thousandths, rounded up.
    #[must_use]
    pub fn milli(self) -> i64 {
        saturate(div_ceil(self.nano, NANO / 1000))
    }

    #[must_use]
    pub fn is_zero(self) -> bool {
        self.nano == 0
    }

    #[must_use]
    pub fn is_positive(self) -> bool {
        self.nano > 0
    }
}

impl Add for Amount {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { nano: self.nano.saturating_add(other.nano).clamp(-MAX, MAX) }
    }
}

impl Sub for Amount {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self { nano: self.nano.saturating_sub(other.nano).clamp(-MAX, MAX) }
    }
}

impl TryFrom<&Quantity> for Amount {
    type Error = QuantityError;
    fn try_from(quantity: &Quantity) -> Result<Self, QuantityError> {
        Self::parse(&quantity.0)
    }
}

impl fmt::Display for Amount {
    /// The shortest decimal form: units, or the largest of `m`, `u`, `n` that loses nothing.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (divisor, suffix) = [(NANO, ""), (NANO / 1000, "m"), (1000, "u"), (1, "n")]
            .into_iter()
            .find(|(divisor, _)| self.nano % divisor == 0)
            .unwrap_or((1, "n"));
        write!(f, "{}{suffix}", self.nano / divisor)
    }
}

fn parse_suffix(suffix: &str) -> Option<Scale> {
    let scale = match suffix {
        "Ki" => Scale::Binary(10),
        "Mi" => Scale::Binary(20),
        "Gi" => Scale::Binary(30),
        "Ti" => Scale::Binary(40),
        "Pi" => Scale::Binary(50),
        "Ei" => Scale::Binary(60),
        "n" => Scale::Decimal(-9),
        "u" => Scale::Decimal(-6),
        "m" => Scale::Decimal(-3),
        "" => Scale::Decimal(0),
        "k" => Scale::Decimal(3),
        "M" => Scale::Decimal(6),
        "G" => Scale::Decimal(9),
        "T" => Scale::Decimal(12),
        "P" => Scale::Decimal(15),
        "E" => Scale::Decimal(18),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E'])?;
            let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
            if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
                return None;
            }
            // Beyond this the outcome is clamped or rounded anyway.
            let power = digits.parse::<i32>().unwrap_or(i32::MAX).min(100);
            Scale::Decimal(if exponent.starts_with('-') { -power } else { power })
        }
    };
    Some(scale)
}

/// Moves the decimal point by `power` places.
fn shift_point(whole: &str, fraction: &str, power: i32) -> (String, String) {
    let places = usize::try_from(power.unsigned_abs()).unwrap_or(usize::MAX);
    if power >= 0 {
        let padded = format!("{fraction:0<places$}");
        let (moved, rest) = padded.split_at(places);
        (format!("{whole}{moved}"), rest.to_owned())
    } else {
        let padded = format!("{whole:0>places$}");
        let (rest, moved) = padded.split_at(padded.len() - places);
        (rest.to_owned(), format!("{moved}{fraction}"))
    }
}

/// `whole.fraction * factor` in nano units, rounded up, clamped. `factor` is at most 2^60.
fn magnitude(whole: &str, fraction: &str, factor: i128) -> i128 {
    let whole = whole
        .bytes()
        .try_fold(0i128, |sum, digit| sum.checked_mul(10)?.checked_add(i128::from(digit - b'0')))
        .and_then(|sum| sum.checked_mul(factor)?.checked_mul(NANO))
        .unwrap_or(MAX);
    // Multiplication as on paper, from the last digit: exact for any number of digits, and what is carried out of the
    // first place is the whole part.
    let mut digits = Vec::with_capacity(fraction.len());
    let carry = fraction.bytes().rev().fold(0i128, |carry, digit| {
        let product = i128::from(digit - b'0') * factor + carry;
        digits.push(product % 10);
        product / 10
    });
    digits.reverse();
    let nanos = (0..NANO_DIGITS).fold(0, |sum, place| sum * 10 + digits.get(place).copied().unwrap_or(0));
    let rest = digits.iter().skip(NANO_DIGITS).any(|digit| *digit != 0);
    whole.saturating_add(carry * NANO + nanos + i128::from(rest)).min(MAX)
}

fn div_ceil(value: i128, by: i128) -> i128 {
    value.div_euclid(by) + i128::from(value.rem_euclid(by) != 0)
}

fn saturate(value: i128) -> i64 {
    i64::try_from(value).unwrap_or(if value < 0 { i64::MIN } else { i64::MAX })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn amount(text: &str) -> Amount {
        Amount::parse(text).unwrap()
    }

    #[test]
    fn every_suffix_has_its_size() {
        for (text, value) in [
            ("0", 0),
            ("1", 1),
            ("-1", -1),
            ("+7", 7),
            ("1k", 1_000),
            ("1Ki", 1_024),
            ("1.5Gi", 1_610_612_736),
            ("2e3", 2_000),
            ("2E3", 2_000),
            ("1E", 1_000_000_000_000_000_000),
            ("12e-1", 2),
            ("1Ei", 1 << 60),
            (".5Ki", 512),
            ("5.", 5),
            ("1.123456789012345Ei", 1_295_257_491_548_889_828),
        ] {
            assert_eq!(amount(text).value(), value, "{text}");
        }
    }

    #[test]
    fn fractions_round_up_and_thousandths_are_exact() {
        assert_eq!(amount("100m").milli(), 100);
        assert_eq!(amount("0.1").milli(), 100);
        assert_eq!(amount("1u").milli(), 1);
        assert_eq!(amount("1n").value(), 1);
        assert_eq!(amount("0.0000000001"), amount("1n"));
        assert_eq!(amount("-1500m").value(), -1);
        assert_eq!(amount("1m").to_string(), "1m");
        assert_eq!(amount("1.5").to_string(), "1500m");
    }

    #[test]
    fn what_is_too_large_is_clamped() {
        for text in
            ["9223372036854775808", "100Ei", "1e99", "99999999999999999999999999999999999999999999999999"]
        {
            assert_eq!(amount(text).value(), i64::MAX, "{text}");
        }
        assert_eq!(amount("0e99"), Amount::ZERO);
        assert_eq!(amount("1e-99"), amount("1n"));
    }

    #[test]
    fn what_is_no_quantity_is_refused() {
        for text in
            ["", "-", ".", "1.2.3", "1 Gi", "Gi", "1gi", "1KB", "e3", "1e", "1e+", "0x10", "١", "1mm", "--1"]
        {
            assert!(Amount::parse(text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(nano in -(MAX)..MAX) {
            let amount = Amount { nano };
            prop_assert_eq!(Amount::parse(&amount.to_string()).unwrap(), amount);
        }

        #[test]
        fn decimals_agree_with_integer_arithmetic(whole in 0i64..1_000_000, milli in 0i64..1000, power in 0u32..5) {
            let suffix = ["", "Ki", "Mi", "Gi", "Ti"][power as usize];
            let text = format!("{whole}.{milli:03}{suffix}");
            let thousandths = i128::from(whole * 1000 + milli) << (10 * power);
            prop_assert_eq!(amount(&text).nano, thousandths * (NANO / 1000));
        }

        #[test]
        fn order_is_that_of_numbers(a in -1_000_000i64..1_000_000, b in -1_000_000i64..1_000_000) {
            prop_assert_eq!(amount(&format!("{a}m")).cmp(&amount(&format!("{b}m"))), a.cmp(&b));
        }

        #[test]
        fn no_text_panics(text in "[-+]?[0-9.eEkKMGTPinum]{0,40}") {
            let _ = Amount::parse(&text);
        }
    }
}
