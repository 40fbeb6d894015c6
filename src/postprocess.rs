//! Logits -> the best labels with their confidence. Pure; what becomes of them is `event.rs`.

use crate::stage::Reject;

/// One label of a frame, best first in its list.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ranked {
    /// Index into the model's labels.
    pub label_id: u32,
    /// Softmax over all classes, 0.0..=1.0.
    pub confidence: f32,
}

/// The `k` best classes, best first, with their softmax over all classes; fewer if there are fewer.
/// Equal logits are ranked by the lower label id.
///
/// # Errors
/// [`Reject::NotFinite`] if any logit is not a finite number, wherever it would rank.
pub fn top(logits: &[f32], k: usize) -> Result<Vec<Ranked>, Reject> {
    // Kept sorted by insertion: for five of a thousand classes almost every logit costs one
    // comparison, where a sort of all would cost ten.
    let k = k.min(logits.len());
    let mut best: Vec<(f32, u32)> = Vec::with_capacity(k + 1);
    for (id, &logit) in (0u32..).zip(logits) {
        if !logit.is_finite() {
            return Err(Reject::NotFinite);
        }
        // A later id never displaces an equal logit, so ties stay in the order of the ids.
        if best.len() < k || best.last().is_some_and(|it| it.0 < logit) {
            let at = best.partition_point(|it| logit <= it.0);
            best.insert(at, (logit, id));
            best.truncate(k);
        }
    }
    let Some(&(max, _)) = best.first() else {
        return Ok(Vec::new());
    };
    // The sum is kept in double precision: a thousand float32 additions would cost the last digits.
    let sum: f64 = logits.iter().map(|it| f64::from((it - max).exp())).sum();
    let ranked = |&(logit, label_id): &(f32, u32)| {
        let confidence = (f64::from((logit - max).exp()) / sum) as f32;
        Ranked { label_id, confidence }
    };
    Ok(best.iter().map(ranked).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(logits: &[f32], k: usize) -> Vec<u32> {
        top(logits, k).unwrap().iter().map(|it| it.label_id).collect()
    }

    #[test]
    fn the_best_come_first_and_ties_go_to_the_lower_id() {
        assert_eq!(ids(&[1.0, 3.0, 2.0, 3.0, 0.0], 3), [1, 3, 2]);
        assert_eq!(ids(&[0.0; 8], 5), [0, 1, 2, 3, 4]);
        assert_eq!(ids(&[0.0, -0.0, 0.0], 2), [0, 1]);
        assert_eq!(ids(&[2.0, 1.0], 5), [0, 1], "fewer classes than wanted");
        assert_eq!(ids(&[], 5), [] as [u32; 0]);
        assert_eq!(ids(&[1.0], 0), [] as [u32; 0]);
    }

    #[test]
    fn confidence_is_the_softmax_over_all_classes() {
        let logits: Vec<f32> = (0..1000).map(|it| ((it * 7919) % 1000) as f32 / 100.0).collect();
        let sum: f64 = logits.iter().map(|it| f64::from(*it).exp()).sum();
        for it in top(&logits, 5).unwrap() {
            let exact = f64::from(logits[it.label_id as usize]).exp() / sum;
            assert!((f64::from(it.confidence) - exact).abs() < 1e-7, "{it:?} is not {exact}");
        }
        let huge = top(&[3e38, -3e38, 3e38], 3).unwrap();
        assert_eq!(huge.iter().map(|it| it.confidence).collect::<Vec<_>>(), [0.5, 0.5, 0.0]);
    }

    #[test]
    fn the_order_equals_that_of_a_full_sort() {
        let mut seed = 1u32;
        for classes in 1..200 {
            let logits: Vec<f32> = (0..classes)
                .map(|_| {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (seed >> 28) as f32
                })
                .collect();
            let mut sorted: Vec<u32> = (0..classes).collect();
            sorted.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
            sorted.truncate(5);
            assert_eq!(ids(&logits, 5), sorted);
        }
    }

    #[test]
    fn a_score_that_is_not_finite_gives_nothing() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 4, 9] {
                let mut logits = [1.0; 10];
                logits[at] = bad;
                assert_eq!(top(&logits, 5), Err(Reject::NotFinite));
            }
        }
    }
}
