//! Removes images that nobody uses when the disk they lie on gets full.
//!
//! What to remove is a pure plan; the loop asks the runtime, plans and removes. An image that a container refers to, even
//! one that has ended, and one that the runtime has pinned are never in a plan.

use super::runtime_client::{RuntimeClient, RuntimeError};
use orlop_proto::cri;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

const PERIOD: Duration = Duration::from_secs(300);

/// When to remove images, and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Percent of the disk in use from which on images are removed; 100: never.
    pub high: u64,
    /// Percent of the disk in use down to which images are removed.
    pub low: u64,
    /// An image that came less than this ago stays: its container may be about to be made.
    pub minimum_age: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { high: 85, low: 80, minimum_age: Duration::from_secs(120) }
    }
}

/// The file system that images lie on, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    pub capacity: u64,
    pub available: u64,
}

/// An image and what we know of its use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub id: String,
    pub size: u64,
    pub is_pinned: bool,
    pub is_in_use: bool,
    pub first_seen: Instant,
    /// None: not since we look.
    pub last_used: Option<Instant>,
}

/// What is to be removed, in this order, until so many bytes are free.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    pub remove: Vec<String>,
    pub to_free: u64,
}

/// The images used longest ago go first, and of those the ones known longest.
#[must_use]
pub fn plan(images: &[Candidate], usage: Usage, limits: Limits, now: Instant) -> Plan {
    let used = usage.capacity.saturating_sub(usage.available);
    let share = |percent: u64| u128::from(usage.capacity) * u128::from(percent) / 100;
    if limits.high >= 100 || usage.capacity == 0 || u128::from(used) < share(limits.high) {
        return Plan::default();
    }
    let to_free = u64::try_from(u128::from(used).saturating_sub(share(limits.low))).unwrap_or(u64::MAX);
    let is_old = |image: &&Candidate| now.saturating_duration_since(image.first_seen) >= limits.minimum_age;
    let mut free: Vec<&Candidate> =
        images.iter().filter(|image| !image.is_pinned && !image.is_in_use).filter(is_old).collect();
    free.sort_by_key(|image| (image.last_used, image.first_seen));
    let mut planned = 0u64;
    let chosen = free.into_iter().take_while(|image| {
        let is_needed = planned < to_free;
        planned = planned.saturating_add(image.size);
        is_needed
    });
    Plan { remove: chosen.map(|image| image.id.clone()).collect(), to_free }
}

/// Looks after the images for as long as it is polled.
pub async fn run(runtime: RuntimeClient, limits: Limits) {
    let mut memory = Memory::default();
    loop {
        tokio::time::sleep(PERIOD).await;
        if let Err(error) = look(&runtime, limits, &mut memory).await {
            tracing::warn!(%error, "unused images cannot be looked for, will be tried again");
        }
    }
}

/// When each image was first seen and last used.
#[derive(Debug, Default)]
struct Memory(HashMap<String, (Instant, Option<Instant>)>);

impl Memory {
    fn candidates(
        &mut self,
        images: Vec<cri::Image>,
        used: &HashSet<String>,
        now: Instant,
    ) -> Vec<Candidate> {
        let present: HashSet<&str> = images.iter().map(|image| image.id.as_str()).collect();
        self.0.retain(|id, _| present.contains(id.as_str()));
        let candidate = |image: &cri::Image| {
            let mut names = std::iter::once(&image.id).chain(&image.repo_tags).chain(&image.repo_digests);
            let is_in_use = names.any(|name| used.contains(name));
            let known = self.0.entry(image.id.clone()).or_insert((now, None));
            if is_in_use {
                known.1 = Some(now);
            }
            Candidate {
                id: image.id.clone(),
                size: image.size,
                is_pinned: image.pinned,
                is_in_use,
                first_seen: known.0,
                last_used: known.1,
            }
        };
        images.iter().map(candidate).collect()
    }
}

async fn look(runtime: &RuntimeClient, limits: Limits, memory: &mut Memory) -> Result<(), RuntimeError> {
    // Images first: a container that is made in between is in the second list, and its image then in use.
    let images = runtime.list_images().await?;
    let containers = runtime.list_containers(None).await?;
    let named = |c: cri::Container| [c.image_ref, c.image_id, c.image.map(|i| i.image).unwrap_or_default()];
    let used: HashSet<String> =
        containers.into_iter().flat_map(named).filter(|name| !name.is_empty()).collect();
    let now = Instant::now();
    let candidates = memory.candidates(images, &used, now);
    let Some(mountpoint) = runtime.image_mountpoint().await? else { return Ok(()) };
    let stat = tokio::task::spawn_blocking(move || rustix::fs::statvfs(&mountpoint)).await;
    let Ok(Ok(stat)) = stat else { return Ok(()) };
    let usage = Usage { capacity: stat.f_blocks * stat.f_frsize, available: stat.f_bavail * stat.f_frsize };
    let plan = plan(&candidates, usage, limits, now);
    let mut freed = 0u64;
    for id in &plan.remove {
        match runtime.remove_image(id).await {
            Ok(()) => freed += candidates.iter().find(|one| one.id == *id).map_or(0, |one| one.size),
            Err(error) => tracing::warn!(image = id, %error, "unused image stays"),
        }
    }
    if plan.to_free > freed {
        tracing::warn!(
            wanted = plan.to_free,
            freed,
            "the images' disk is too full, and there are not enough unused images"
        );
    } else if !plan.remove.is_empty() {
        tracing::info!(
            images = plan.remove.len(),
            freed,
            "removed unused images, since their disk was getting full"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(id: &str, size: u64, now: Instant) -> Candidate {
        let first_seen = now.checked_sub(Duration::from_secs(600)).unwrap();
        Candidate { id: id.into(), size, is_pinned: false, is_in_use: false, first_seen, last_used: None }
    }

    #[test]
    fn nothing_is_removed_below_the_threshold_and_above_it_the_least_recently_used_down_to_the_other() {
        let now = Instant::now();
        let recent = Candidate { last_used: Some(now), ..candidate("recent", 50, now) };
        let images = [recent, candidate("a", 4, now), candidate("b", 4, now), candidate("c", 4, now)];
        let at = |available| plan(&images, Usage { capacity: 100, available }, Limits::default(), now);
        assert_eq!(at(16), Plan::default());
        assert_eq!(at(14), Plan { remove: vec!["a".into(), "b".into()], to_free: 6 });
        assert_eq!(at(0).remove, ["a", "b", "c", "recent"]);
        let never = Limits { high: 100, ..Limits::default() };
        assert_eq!(plan(&images, Usage { capacity: 100, available: 0 }, never, now), Plan::default());
    }

    #[test]
    fn what_is_in_use_pinned_or_new_stays_however_full_the_disk_is() {
        let now = Instant::now();
        let images = [
            Candidate { is_pinned: true, ..candidate("pause", 9, now) },
            Candidate { is_in_use: true, ..candidate("used", 9, now) },
            Candidate { first_seen: now, ..candidate("new", 9, now) },
        ];
        let plan = plan(&images, Usage { capacity: 100, available: 0 }, Limits::default(), now);
        assert_eq!(plan, Plan { remove: Vec::new(), to_free: 20 });
    }

    #[test]
    fn an_image_is_in_use_under_any_of_its_names_and_its_last_use_is_remembered() {
        let image = |id: &str, tag: &str| cri::Image {
            id: id.into(),
            repo_tags: vec![tag.into()],
            ..cri::Image::default()
        };
        let (mut memory, now) = (Memory::default(), Instant::now());
        let both = || vec![image("1", "a:1"), image("2", "b:1")];
        let used = HashSet::from(["a:1".to_owned()]);
        let seen = memory.candidates(both(), &used, now);
        assert_eq!((seen[0].is_in_use, seen[1].is_in_use), (true, false));
        let later = memory.candidates(both(), &HashSet::new(), now + Duration::from_secs(9));
        assert_eq!((later[0].last_used, later[0].first_seen), (Some(now), now));
    }
}
