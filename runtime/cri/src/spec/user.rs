//! Who a container runs as: what the pod asks for, what the image says, and the image's own user database.

use super::SpecError;
use orlop_proto::cri::{LinuxContainerSecurityContext, SupplementalGroupsPolicy};

/// `/etc/passwd` and `/etc/group` of an image.
#[derive(Debug, Clone, Default)]
pub(crate) struct UserDatabase {
    pub(crate) passwd: String,
    pub(crate) group: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// The primary group first.
    pub(crate) groups: Vec<u32>,
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
}

impl UserDatabase {
    fn users(&self) -> impl Iterator<Item = PasswdEntry<'_>> {
        self.passwd.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next().filter(|n| !n.is_empty())?;
            let uid = fields.nth(1)?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            Some(PasswdEntry { name, uid, gid })
        })
    }

    /// Name, id and members of each group.
    fn groups(&self) -> impl Iterator<Item = (&str, u32, &str)> {
        self.group.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next().filter(|n| !n.is_empty())?;
            let gid = fields.nth(1)?.parse().ok()?;
            Some((name, gid, fields.next().unwrap_or_default()))
        })
    }

    fn find_user(&self, text: &str) -> Result<(u32, Option<PasswdEntry<'_>>), SpecError> {
        // A name wins over a number of the same spelling, as in every tool that takes both.
        if let Some(entry) = self.users().find(|u| u.name == text) {
            return Ok((entry.uid, Some(entry)));
        }
        let uid: u32 = text.parse().map_err(|_| SpecError::UnknownUser(text.to_owned()))?;
        Ok((uid, self.users().find(|u| u.uid == uid)))
    }

    fn find_group(&self, text: &str) -> Result<u32, SpecError> {
        if let Some((_, gid, _)) = self.groups().find(|(name, ..)| *name == text) {
            return Ok(gid);
        }
        text.parse().map_err(|_| SpecError::UnknownGroup(text.to_owned()))
    }
}

fn id(field: &'static str, value: i64) -> Result<u32, SpecError> {
    u32::try_from(value).map_err(|_| SpecError::Invalid {
        field,
        reason: format!("{value} is not between 0 and {}", u32::MAX),
    })
}

/// `image_user` is the image's `User`: empty, `user`, or `user:group`, each a name or a number.
pub(crate) fn resolve(
    security: &LinuxContainerSecurityContext,
    image_user: &str,
    database: &UserDatabase,
) -> Result<User, SpecError> {
    let (image_name, image_group) = match image_user.split_once(':') {
        Some((user, group)) => (user, group),
        None => (image_user, ""),
    };
    let asked_for_user = security.run_as_user.is_some() || !security.run_as_username.is_empty();
    if security.run_as_group.is_some() && !asked_for_user {
        return Err(SpecError::Invalid {
            field: "run_as_group",
            reason: "it is set without run_as_user or run_as_username".into(),
        });
    }
    let (uid, entry) = if let Some(user) = &security.run_as_user {
        let uid = id("run_as_user", user.value)?;
        (uid, database.users().find(|u| u.uid == uid))
    } else if !security.run_as_username.is_empty() {
        let name = security.run_as_username.as_str();
        let entry = database.users().find(|u| u.name == name);
        let entry = entry.ok_or_else(|| SpecError::UnknownUser(name.to_owned()))?;
        (entry.uid, Some(entry))
    } else if image_name.is_empty() {
        (0, database.users().find(|u| u.uid == 0))
    } else {
        database.find_user(image_name)?
    };
    let gid = match &security.run_as_group {
        Some(group) => id("run_as_group", group.value)?,
        None if !asked_for_user && !image_group.is_empty() => database.find_group(image_group)?,
        None => entry.as_ref().map_or(0, |e| e.gid),
    };
    let mut groups = vec![gid];
    let merge = security.supplemental_groups_policy != SupplementalGroupsPolicy::Strict as i32;
    if let (true, Some(entry)) = (merge, &entry) {
        groups.extend(
            database
                .groups()
                .filter(|(_, _, members)| members.split(',').any(|m| m == entry.name))
                .map(|(_, gid, _)| gid),
        );
    }
    for group in &security.supplemental_groups {
        groups.push(id("supplemental_groups", *group)?);
    }
    let mut seen = std::collections::HashSet::new();
    groups.retain(|g| seen.insert(*g));
    Ok(User { uid, gid, groups })
}

#[cfg(test)]
mod tests {
    use super::*;
    use orlop_proto::cri::Int64Value;

    fn database() -> UserDatabase {
        UserDatabase {
            passwd: "root:x:0:0::/root:/bin/sh\nweb:x:101:102::/:/bin/false\nbroken\n".into(),
            group: "root:x:0:\nweb:x:102:\nlogs:x:300:root,web\ntape:x:301:web\n".into(),
        }
    }

    fn run(change: impl FnOnce(&mut LinuxContainerSecurityContext), image: &str) -> Result<User, SpecError> {
        let mut security = LinuxContainerSecurityContext::default();
        change(&mut security);
        resolve(&security, image, &database())
    }

    #[test]
    fn the_image_user_is_looked_up_with_its_groups() {
        let user = run(|_| {}, "web").unwrap();
        assert_eq!(user, User { uid: 101, gid: 102, groups: vec![102, 300, 301] });
        assert_eq!(run(|_| {}, "web:logs").unwrap().gid, 300);
        assert_eq!(run(|_| {}, "5:6").unwrap(), User { uid: 5, gid: 6, groups: vec![6] });
        assert_eq!(run(|_| {}, "").unwrap(), User { uid: 0, gid: 0, groups: vec![0, 300] });
    }

    #[test]
    fn a_number_takes_its_group_from_passwd_when_listed() {
        let user = |uid| run(move |s| s.run_as_user = Some(Int64Value { value: uid }), "root").unwrap();
        assert_eq!(user(101).gid, 102);
        assert_eq!(user(4242), User { uid: 4242, gid: 0, groups: vec![0] });
    }

    #[test]
    fn strict_leaves_the_image_groups_out() {
        let user = run(
            |s| {
                s.supplemental_groups = vec![7, 7, 102];
                s.supplemental_groups_policy = SupplementalGroupsPolicy::Strict as i32;
            },
            "web",
        );
        assert_eq!(user.unwrap().groups, vec![102, 7]);
    }

    #[test]
    fn unknown_names_and_a_lone_group_are_refused() {
        assert!(matches!(run(|_| {}, "nobody"), Err(SpecError::UnknownUser(n)) if n == "nobody"));
        assert!(matches!(run(|s| s.run_as_username = "101".into(), ""), Err(SpecError::UnknownUser(_))));
        assert!(matches!(run(|_| {}, "web:staff"), Err(SpecError::UnknownGroup(_))));
        assert!(run(|s| s.run_as_group = Some(Int64Value { value: 1 }), "").is_err());
        assert!(run(|s| s.run_as_user = Some(Int64Value { value: -1 }), "").is_err());
    }
}
