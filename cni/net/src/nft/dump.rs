//! Reading back what the kernel holds: for tests, for reconciling after a restart, for diagnosis.

use super::attr::{Attributes, read_be32, read_be64, read_string};
use super::batch::{GETCHAIN, GETRULE, GETSET, GETSETELEM, GETTABLE};
use super::expr::Verdict;
use super::object::{Element, ElementData, Family, RangeEnd, Table};
use super::socket::{NftError, NftSocket};
use super::value::Value;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableInfo {
    pub table: Table,
    pub handle: u64,
    pub comment: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainInfo {
    pub name: String,
    pub handle: u64,
    pub is_base: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleInfo {
    pub chain: String,
    pub handle: u64,
    pub comment: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetInfo {
    pub name: String,
    pub flags: u32,
    pub key_type: u32,
    pub key_len: u32,
    pub data_type: u32,
    pub data_len: u32,
}

impl NftSocket {
    /// Tables of all families.
    ///
    /// # Errors
    /// [`NftError`], as all dumps.
    pub fn tables(&mut self) -> Result<Vec<TableInfo>, NftError> {
        self.dump(
            "tables",
            (GETTABLE, 0),
            |_| {},
            |family, attributes| {
                let mut info = TableInfo {
                    table: Table::new(Family::from_number(family)?, ""),
                    handle: 0,
                    comment: None,
                };
                for (kind, payload) in Attributes::new(attributes) {
                    match kind {
                        1 => info.table.name = read_string(payload).into(),
                        4 => info.handle = read_be64(payload)?,
                        6 => info.comment = comment(payload),
                        _ => {}
                    }
                }
                Some(info)
            },
        )
    }

    /// # Errors
    /// [`NftError`]
    pub fn has_table(&mut self, table: &Table) -> Result<bool, NftError> {
        Ok(self.tables()?.iter().any(|info| info.table == *table))
    }

    /// The chains of a table; none if it does not exist.
    ///
    /// # Errors
    /// [`NftError`]
    pub fn chains(&mut self, table: &Table) -> Result<Vec<ChainInfo>, NftError> {
        self.dump(
            "chains",
            (GETCHAIN, table.family.number()),
            |_| {},
            |_, attributes| {
                if read_string(Attributes::find(attributes, 1)?) != *table.name {
                    return None;
                }
                Some(ChainInfo {
                    name: read_string(Attributes::find(attributes, 3)?),
                    handle: read_be64(Attributes::find(attributes, 2)?)?,
                    is_base: Attributes::find(attributes, 4).is_some(),
                })
            },
        )
    }

    /// The rules of a table, chain by chain in their order; none if it does not exist.
    ///
    /// # Errors
    /// [`NftError`]
    pub fn rules(&mut self, table: &Table) -> Result<Vec<RuleInfo>, NftError> {
        self.dump(
            "rules",
            (GETRULE, table.family.number()),
            |w| w.string(1, &table.name),
            |_, attributes| {
                Some(RuleInfo {
                    chain: read_string(Attributes::find(attributes, 2)?),
                    handle: read_be64(Attributes::find(attributes, 3)?)?,
                    comment: Attributes::find(attributes, 7).and_then(comment),
                })
            },
        )
    }

    /// The named sets and maps of a table.
    ///
    /// # Errors
    /// [`NftError`]; an unknown table is one.
    pub fn sets(&mut self, table: &Table) -> Result<Vec<SetInfo>, NftError> {
        self.dump(
            "sets",
            (GETSET, table.family.number()),
            |w| w.string(1, &table.name),
            |_, attributes| {
                let number = |kind| Attributes::find(attributes, kind).and_then(read_be32).unwrap_or(0);
                Some(SetInfo {
                    name: read_string(Attributes::find(attributes, 2)?),
                    flags: number(3),
                    key_type: number(4),
                    key_len: number(5),
                    data_type: number(6),
                    data_len: number(7),
                })
            },
        )
    }

    /// The elements of a set or map. Ranges of single-field interval sets come back as their two halves, each as an
    /// element without an end; those of concatenations complete.
    ///
    /// # Errors
    /// [`NftError`]; an unknown table or set is one.
    pub fn elements(&mut self, table: &Table, set: &str) -> Result<Vec<Element>, NftError> {
        let request = (GETSETELEM, table.family.number());
        let lists = self.dump(
            "elements",
            request,
            |w| {
                w.string(1, &table.name);
                w.string(2, set);
            },
            |_, attributes| {
                let list = Attributes::find(attributes, 3).unwrap_or_default();
                Some(Attributes::new(list).filter_map(|(_, entry)| element(entry)).collect::<Vec<_>>())
            },
        )?;
        Ok(lists.into_iter().flatten().collect())
    }
}

fn element(entry: &[u8]) -> Option<Element> {
    let value = |payload| Some(Value::raw(Attributes::find(payload, 1)?));
    let mut element = Element::new(value(Attributes::find(entry, 1)?)?);
    element.data = Attributes::find(entry, 2).and_then(|payload| {
        value(payload)
            .map(ElementData::Value)
            .or_else(|| Some(ElementData::Verdict(verdict(Attributes::find(payload, 2)?)?)))
    });
    element.timeout_ms = Attributes::find(entry, 4).and_then(read_be64);
    element.end = Attributes::find(entry, 10).and_then(value).map(RangeEnd::Fields);
    Some(element)
}

fn verdict(payload: &[u8]) -> Option<Verdict> {
    let chain = Attributes::find(payload, 2).map(read_string);
    match (read_be32(Attributes::find(payload, 1)?)?.cast_signed(), chain) {
        (0, _) => Some(Verdict::Drop),
        (1, _) => Some(Verdict::Accept),
        (-1, _) => Some(Verdict::Continue),
        (-3, Some(chain)) => Some(Verdict::Jump(chain)),
        (-4, Some(chain)) => Some(Verdict::Goto(chain)),
        (-5, _) => Some(Verdict::Return),
        _ => None,
    }
}

/// The text of type 0 in `nft`'s list of attached data.
fn comment(mut userdata: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = userdata {
        let value = rest.get(..usize::from(*length))?;
        if *kind == 0 {
            return Some(read_string(value));
        }
        userdata = &rest[value.len()..];
    }
    None
}
