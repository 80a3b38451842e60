//! Kubernetes quantities (`100m`, `1Gi`, `2e3`) as exact integers.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// The quantity in thousandths, rounded up; none when it is not a quantity or too large to count.
#[must_use]
pub fn milli(quantity: &Quantity) -> Option<i128> {
    parse_nano(&quantity.0).map(|nano| div_up(nano, 1_000_000))
}

/// The quantity in whole units, rounded up.
#[must_use]
pub fn whole(quantity: &Quantity) -> Option<i64> {
    parse_nano(&quantity.0)
        .map(|nano| div_up(nano, 1_000_000_000))
        .and_then(|units| i64::try_from(units).ok())
}

fn div_up(value: i128, by: i128) -> i128 {
    value.div_euclid(by) + i128::from(value.rem_euclid(by) != 0)
}

fn parse_nano(text: &str) -> Option<i128> {
    let split =
        text.find(|c: char| !c.is_ascii_digit() && !matches!(c, '.' | '+' | '-')).unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let (negative, digits) = match number.as_bytes().first()? {
        b'-' => (true, &number[1..]),
        b'+' => (false, &number[1..]),
        _ => (false, number),
    };
    let (integer, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if integer.is_empty() && fraction.is_empty() {
        return None;
    }
    let mantissa: i128 = format!("{integer}{fraction}").parse().ok()?;
    let scale = i32::try_from(fraction.len()).ok()?;
    let value = match binary_exponent(suffix) {
        Some(power) => {
            let scaled = mantissa.checked_mul(1i128.checked_shl(power)?)?.checked_mul(1_000_000_000)?;
            div_up(scaled, 10i128.checked_pow(scale.unsigned_abs())?)
        }
        None => shift_decimal(mantissa, decimal_exponent(suffix)?.checked_add(9)?.checked_sub(scale)?)?,
    };
    Some(if negative { -value } else { value })
}

fn shift_decimal(mantissa: i128, exponent: i32) -> Option<i128> {
    let factor = 10i128.checked_pow(exponent.unsigned_abs());
    if exponent >= 0 {
        mantissa.checked_mul(factor?)
    } else {
        Some(factor.map_or_else(|| i128::from(mantissa > 0), |factor| div_up(mantissa, factor)))
    }
}

fn binary_exponent(suffix: &str) -> Option<u32> {
    Some(match suffix {
        "Ki" => 10,
        "Mi" => 20,
        "Gi" => 30,
        "Ti" => 40,
        "Pi" => 50,
        "Ei" => 60,
        _ => return None,
    })
}

fn decimal_exponent(suffix: &str) -> Option<i32> {
    Some(match suffix {
        "n" => -9,
        "u" => -6,
        "m" => -3,
        "" => 0,
        "k" => 3,
        "M" => 6,
        "G" => 9,
        "T" => 12,
        "P" => 15,
        "E" => 18,
        _ => suffix.strip_prefix(['e', 'E'])?.parse().ok().filter(|power: &i32| power.abs() <= 27)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_and_fractions_are_exact() {
        for (text, expected) in [
            ("100m", Some(100)),
            ("0.5", Some(500)),
            ("1", Some(1000)),
            ("1Ki", Some(1_024_000)),
            ("1.5Gi", Some(1_610_612_736_000)),
            ("2e3", Some(2_000_000)),
            ("1E", Some(1_000_000_000_000_000_000_000)),
            ("1n", Some(1)),
            ("-1", Some(-1000)),
            ("", None),
            ("abc", None),
            ("1Xi", None),
            (".", None),
        ] {
            assert_eq!(milli(&Quantity(text.into())), expected, "{text}");
        }
        assert_eq!(whole(&Quantity("128Mi".into())), Some(128 << 20));
    }
}
