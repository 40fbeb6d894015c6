//! Durations and sizes with their units: `200ms`, `4s`, `7d`, `20GiB`.

use std::time::Duration;

/// Units of time, in nanoseconds.
const DURATIONS: [(&str, f64); 6] =
    [("us", 1e3), ("ms", 1e6), ("s", 1e9), ("m", 60e9), ("h", 3_600e9), ("d", 86_400e9)];

/// Units of size, in bytes.
const SIZES: [(&str, f64); 9] = [
    ("B", 1.0),
    ("kB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("TB", 1e12),
    ("KiB", 1024.0),
    ("MiB", 1_048_576.0),
    ("GiB", 1_073_741_824.0),
    ("TiB", 1_099_511_627_776.0),
];

/// A number with a unit of time, up to about a thousand years. `None` if it is anything else.
pub fn duration(text: &str) -> Option<Duration> {
    let nanoseconds = number(text, &DURATIONS).filter(|it| *it <= 3e19)?;
    let nanoseconds = nanoseconds.round() as u128;
    let seconds = u64::try_from(nanoseconds / 1_000_000_000).ok()?;
    Some(Duration::new(seconds, (nanoseconds % 1_000_000_000) as u32))
}

/// A number with a unit of size, in bytes, below 8 PiB. `None` if it is anything else.
pub fn size(text: &str) -> Option<u64> {
    // Up to here every whole number is a float of its own.
    number(text, &SIZES).filter(|it| *it <= 9e15).map(|it| it.round() as u64)
}

/// The shortest way to write a duration in one unit.
pub fn show_duration(it: Duration) -> String {
    show(it.as_nanos() as f64, &DURATIONS)
}

/// The shortest way to write a size in one unit, to two decimals.
pub fn show_size(bytes: u64) -> String {
    let decimal = bytes != 0 && bytes.is_multiple_of(1_000) && !bytes.is_multiple_of(1024);
    show(
        bytes as f64,
        if decimal { &SIZES[..5] } else { &[SIZES[0], SIZES[5], SIZES[6], SIZES[7], SIZES[8]] },
    )
}

fn show(number: f64, units: &[(&str, f64)]) -> String {
    let whole = |it: &&(&str, f64)| it.1 <= number;
    let (name, factor) = units.iter().rev().find(whole).unwrap_or(&units[0]);
    format!("{}{name}", (number / factor * 100.0).round() / 100.0)
}

fn number(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(end);
    if number.is_empty() || number.starts_with('.') || number.ends_with('.') {
        return None;
    }
    let unit = unit.strip_prefix(' ').unwrap_or(unit);
    let factor = units.iter().find(|it| it.0 == unit)?.1;
    Some(number.parse::<f64>().ok()? * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_number_and_a_unit() {
        let check = |text, ms: Option<u64>| {
            assert_eq!(duration(text), ms.map(Duration::from_millis), "{text}");
        };
        check("200ms", Some(200));
        check("4s", Some(4_000));
        check("1.5s", Some(1_500));
        check("0 ms", Some(0));
        check("10m", Some(600_000));
        check("7d", Some(7 * 86_400_000));
        for wrong in ["", "5", "s", "-1s", "1.s", ".5s", "1e3s", "5 weeks", "1s ", "1..2s", "5S"] {
            check(wrong, None);
        }
        check(&format!("{}d", "9".repeat(400)), None);
        assert_eq!(duration("1us"), Some(Duration::from_micros(1)));
    }

    #[test]
    fn sizes_need_a_number_and_a_unit() {
        let check = |text, bytes| assert_eq!(size(text), bytes, "{text}");
        check("20GiB", Some(20 << 30));
        check("1.5KiB", Some(1_536));
        check("5 MB", Some(5_000_000));
        check("0B", Some(0));
        for wrong in ["", "20", "GiB", "20GIB", "20gb", "-1B", "9999999TiB"] {
            check(wrong, None);
        }
    }

    #[test]
    fn what_is_shown_reads_back() {
        for text in ["0us", "200ms", "4s", "10m", "7d", "1.5s"] {
            assert_eq!(show_duration(duration(text).unwrap()), text);
        }
        for text in ["0B", "20GiB", "1.5KiB", "5MB", "100B"] {
            assert_eq!(show_size(size(text).unwrap()), text);
        }
    }
}
