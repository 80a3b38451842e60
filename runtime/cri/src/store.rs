//! The sandboxes and containers of this node in memory, by id, and the names they hold.
//!
//! Locks here are held for a lookup or an insertion, never over work.

use crate::container::Container;
use crate::error::CriError;
use crate::sandbox::Sandbox;
use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

type Map<T> = RwLock<BTreeMap<String, Arc<T>>>;

#[derive(Debug, Default)]
pub(crate) struct Store {
    sandboxes: Map<Sandbox>,
    containers: Map<Container>,
    names: Mutex<HashMap<String, String>>,
}

fn read<T>(map: &Map<T>) -> RwLockReadGuard<'_, BTreeMap<String, Arc<T>>> {
    map.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(map: &Map<T>) -> RwLockWriteGuard<'_, BTreeMap<String, Arc<T>>> {
    map.write().unwrap_or_else(PoisonError::into_inner)
}

/// By full id, or by a prefix that only one has.
fn find<T>(map: &Map<T>, id: &str) -> Option<Arc<T>> {
    let map = read(map);
    if let Some(found) = map.get(id) {
        return Some(found.clone());
    }
    if id.is_empty() {
        return None;
    }
    let mut range = map.range::<str, _>((Bound::Included(id), Bound::Unbounded));
    let (_, first) = range.next().filter(|(key, _)| key.starts_with(id))?;
    match range.next() {
        Some((key, _)) if key.starts_with(id) => None,
        _ => Some(first.clone()),
    }
}

/// A name held while its owner is being made; freed again unless kept.
#[derive(Debug)]
pub(crate) struct Reservation<'a> {
    store: &'a Store,
    name: Option<String>,
}

impl Reservation<'_> {
    pub(crate) fn keep(mut self) {
        self.name = None;
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if let Some(name) = self.name.take() {
            self.store.names().remove(&name);
        }
    }
}

impl Store {
    fn names(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn reserve(
        &self,
        what: &'static str,
        name: &str,
        id: &str,
    ) -> Result<Reservation<'_>, CriError> {
        let key = format!("{what}/{name}");
        let mut names = self.names();
        if let Some(owner) = names.get(&key) {
            return Err(CriError::NameTaken { what, name: name.to_owned(), owner: owner.clone() });
        }
        names.insert(key.clone(), id.to_owned());
        Ok(Reservation { store: self, name: Some(key) })
    }

    pub(crate) fn sandbox(&self, id: &str) -> Option<Arc<Sandbox>> {
        find(&self.sandboxes, id)
    }

    pub(crate) fn container(&self, id: &str) -> Option<Arc<Container>> {
        find(&self.containers, id)
    }

    pub(crate) fn sandboxes(&self) -> Vec<Arc<Sandbox>> {
        read(&self.sandboxes).values().cloned().collect()
    }

    pub(crate) fn containers(&self) -> Vec<Arc<Container>> {
        read(&self.containers).values().cloned().collect()
    }

    pub(crate) fn containers_of(&self, sandbox: &str) -> Vec<Arc<Container>> {
        read(&self.containers).values().filter(|c| c.sandbox_id == sandbox).cloned().collect()
    }

    pub(crate) fn insert_sandbox(&self, sandbox: Arc<Sandbox>) {
        write(&self.sandboxes).insert(sandbox.id.clone(), sandbox);
    }

    pub(crate) fn insert_container(&self, container: Arc<Container>) {
        write(&self.containers).insert(container.id.clone(), container);
    }

    pub(crate) fn remove_sandbox(&self, id: &str, name: &str) {
        write(&self.sandboxes).remove(id);
        self.names().remove(&format!("sandbox/{name}"));
    }

    pub(crate) fn remove_container(&self, id: &str, name: &str) {
        write(&self.containers).remove(id);
        self.names().remove(&format!("container/{name}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_free_again_when_its_reservation_is_dropped() {
        let store = Store::default();
        let held = store.reserve("sandbox", "a", "1").unwrap();
        assert!(
            matches!(store.reserve("sandbox", "a", "2"), Err(CriError::NameTaken { owner, .. }) if owner == "1")
        );
        assert!(store.reserve("container", "a", "2").is_ok());
        drop(held);
        store.reserve("sandbox", "a", "3").unwrap().keep();
        assert!(store.reserve("sandbox", "a", "4").is_err());
    }

    #[test]
    fn a_prefix_finds_only_what_it_names_alone() {
        let map: Map<u8> = RwLock::default();
        for (id, value) in [("aa1", 1), ("aa2", 2), ("ab", 3)] {
            write(&map).insert(id.into(), Arc::new(value));
        }
        assert_eq!(find(&map, "ab").as_deref(), Some(&3));
        assert_eq!(find(&map, "aa"), None);
        assert_eq!(find(&map, "aa2").as_deref(), Some(&2));
        assert_eq!(find(&map, ""), None);
        assert_eq!(find(&map, "x"), None);
    }
}
