//! The budgets: what a figure may be, beside the peer's of the same run or by itself.

use crate::bench::figures::rounded;
use serde_json::{Value, json};

/// One budget and how the run kept it.
#[derive(Debug, Clone)]
pub struct Verdict {
    pub what: String,
    pub unit: &'static str,
    pub ours: Option<f64>,
    pub peer_name: &'static str,
    pub peer: Option<f64>,
    pub limit: Limit,
}

/// What a budget is set against.
#[derive(Debug, Clone, Copy)]
pub enum Limit {
    /// At most this share of the peer's figure.
    Share(f64),
    /// At most this, whatever a peer does.
    Absolute(f64),
    /// No budget: shown for comparison.
    None,
}

impl Verdict {
    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        let (ours, peer) = (self.ours?, self.peer?);
        (peer > 0.0).then_some(ours / peer)
    }

    /// None where something was not measured or there is no budget.
    #[must_use]
    pub fn kept(&self) -> Option<bool> {
        match self.limit {
            Limit::Share(share) => Some(self.ratio()? <= share),
            Limit::Absolute(most) => Some(self.ours? <= most),
            Limit::None => None,
        }
    }

    #[must_use]
    pub fn to_json(&self) -> Value {
        let (share, absolute) = match self.limit {
            Limit::Share(share) => (Some(rounded(share)), None),
            Limit::Absolute(most) => (None, Some(most)),
            Limit::None => (None, None),
        };
        json!({
            "what": self.what,
            "unit": self.unit,
            "orlop": self.ours.map(rounded),
            "peer_name": self.peer_name,
            "peer": self.peer.map(rounded),
            "ratio": self.ratio().map(|ratio| (ratio * 1e5).round() / 1e5),
            "budget_ratio": share,
            "budget_absolute": absolute,
            "kept": self.kept(),
        })
    }

    /// A line of the table for people.
    #[must_use]
    pub fn line(&self) -> String {
        let figure = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.2}"));
        let budget = match self.limit {
            Limit::Share(share) => format!("{share:.3}x"),
            Limit::Absolute(most) => format!("{most:.2}"),
            Limit::None => "-".to_owned(),
        };
        let kept = match (self.kept(), self.limit) {
            (_, Limit::None) => "",
            (Some(true), _) => "kept",
            (Some(false), _) => "MISSED",
            (None, _) => "not measured",
        };
        format!(
            "{:<44} {:>10} {:<3} {:>10} {:<12} {:>8} {:>8}  {kept}",
            self.what,
            figure(self.ours),
            self.unit,
            figure(self.peer),
            self.peer_name,
            self.ratio().map_or_else(|| "-".to_owned(), |r| format!("{r:.3}x")),
            budget,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(ours: Option<f64>, peer: Option<f64>, limit: Limit) -> Verdict {
        Verdict { what: "x".into(), unit: "ms", ours, peer_name: "peer", peer, limit }
    }

    #[test]
    fn a_budget_without_a_measured_peer_is_neither_kept_nor_missed() {
        assert_eq!(verdict(Some(1.0), None, Limit::Share(0.5)).kept(), None);
        assert_eq!(verdict(Some(1.0), Some(4.0), Limit::Share(0.5)).kept(), Some(true));
        assert_eq!(verdict(Some(3.0), Some(4.0), Limit::Share(0.5)).kept(), Some(false));
        assert_eq!(verdict(Some(3.0), None, Limit::Absolute(2.0)).kept(), Some(false));
    }
}
