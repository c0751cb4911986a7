//! How long prompts and answers are, in tokens.

use std::fmt;
use std::str::FromStr;

use rand::RngExt as _;
use rand::rngs::StdRng;

/// The longest that can be asked for.
const MOST: u32 = 1_000_000;

/// `512`, or evenly between two, both included: `100-900`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    least: u32,
    most: u32,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no length: write it like 512, or like 100-900, in tokens, from 1 to {MOST}")]
pub struct LengthsError(String);

impl Lengths {
    pub(super) fn draw(self, rng: &mut StdRng) -> u32 {
        rng.random_range(self.least..=self.most)
    }

    /// The shortest that can be drawn.
    pub fn least(self) -> u32 {
        self.least
    }
}

impl FromStr for Lengths {
    type Err = LengthsError;

    fn from_str(text: &str) -> Result<Self, LengthsError> {
        let wrong = || LengthsError(text.to_owned());
        let number = |text: &str| text.trim().parse::<u32>().map_err(|_| wrong());
        let (least, most) = match text.split_once('-') {
            Some((least, most)) => (number(least)?, number(most)?),
            None => (number(text)?, number(text)?),
        };
        if least == 0 || least > most || most > MOST {
            return Err(wrong());
        }
        Ok(Self { least, most })
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.least == self.most {
            true => write!(f, "{}", self.least),
            false => write!(f, "{}-{}", self.least, self.most),
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;

    use super::*;

    #[test]
    fn one_number_or_two() {
        for (text, least, most) in [("512", 512, 512), ("1-9", 1, 9), (" 5 - 5 ", 5, 5)] {
            assert_eq!(text.parse(), Ok(Lengths { least, most }));
        }
        for text in [
            "", "0", "0-5", "9-1", "x", "1-", "-1", "1-2-3", "1000001", "1.5",
        ] {
            assert!(text.parse::<Lengths>().is_err(), "{text}");
        }
        assert_eq!("7-9".parse::<Lengths>().unwrap().to_string(), "7-9");
        assert_eq!("7".parse::<Lengths>().unwrap().to_string(), "7");
    }

    #[test]
    fn what_is_drawn_lies_between_and_reaches_both_ends() {
        let mut rng = StdRng::seed_from_u64(1);
        let lengths: Lengths = "3-5".parse().unwrap();
        let mut seen = [0; 3];
        for _ in 0..300 {
            seen[lengths.draw(&mut rng) as usize - 3] += 1;
        }
        assert!(seen.iter().all(|count| *count > 50), "{seen:?}");
    }
}
