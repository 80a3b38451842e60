//! nftables without the `nft` program: rulesets as values, one transaction per change.
//!
//! [`Batch`] is a plan, plain data that tests compare; [`NftSocket`] commits it and reads back what the kernel holds.
//! Messages are written directly: most expressions we need (nat, numgen, fib, dynset…) have no types in the netlink
//! crates, and a large service table should cost one buffer.

mod attr;
mod batch;
mod dump;
pub mod expr;
pub mod object;
mod socket;
pub mod value;

pub use batch::{Batch, Op};
pub use dump::{ChainInfo, RuleInfo, SetInfo, TableInfo};
pub use expr::{
    CmpOp, CtDirection, CtKey, DynsetOp, Expr, FibResult, IpFamily, LimitKind, MetaKey, NatKind, NumgenKind,
    PayloadBase, Reg, RejectKind, Verdict, ct_state, ct_status, fib_flags, matches, nat_flags,
};
pub use object::{
    BaseChain, Chain, ChainType, Element, ElementData, Family, Hook, Policy, RangeEnd, Rule, Set, SetData,
    Table, priority,
};
pub use socket::{NftError, NftSocket};
pub use value::{FieldType, Value};
