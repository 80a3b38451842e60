//! Round trips through the kernel: what a batch says is what `nft` lists. Each test has a network namespace of its own
//! that ends with it.

#![allow(clippy::unwrap_used)]

use orlop_net::netns::Netns;
use orlop_net::nft::*;
use std::net::Ipv4Addr;
use std::process::Command;

fn in_new_namespace(test: impl FnOnce(&mut NftSocket) + Send) {
    let namespace = Netns::create().expect("these tests need root");
    namespace.run(|| test(&mut NftSocket::open().unwrap())).unwrap();
}

fn nft(arguments: &[&str]) -> String {
    let out = Command::new("nft").args(arguments).output().expect("these tests need the nft program");
    assert!(out.status.success(), "nft {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn has_line(listing: &str, line: &str) -> bool {
    listing.lines().any(|l| l.trim() == line)
}

fn ip(text: &str) -> Value {
    Value::of_ip(text.parse().unwrap())
}

#[test]
#[allow(clippy::too_many_lines, reason = "one ruleset that has every kind of rule")]
fn chains_and_rules_are_listed_as_meant() {
    in_new_namespace(|socket| {
        let t = Table::new(Family::Inet, "orlop-test");
        let mut b = Batch::new();
        b.destroy_table(&t);
        b.add_table_with_comment(&t, "version 1");
        b.add_chain(&t, Chain::base("pre", ChainType::Nat, Hook::Prerouting, priority::DSTNAT));
        b.add_chain(&t, Chain::base("post", ChainType::Nat, Hook::Postrouting, priority::SRCNAT));
        b.add_chain(
            &t,
            Chain::base("in", ChainType::Filter, Hook::Input, priority::FILTER).policy(Policy::Drop),
        );
        b.add_chain(&t, Chain::regular("work"));
        let r = Reg(0);
        b.add_rule(
            &t,
            "pre",
            Rule::new()
                .with(matches::daddr_is_local())
                .verdict(Verdict::Jump("work".into()))
                .comment("to work"),
        );
        b.add_rule(
            &t,
            "work",
            Rule::new()
                .with(matches::family(IpFamily::V4))
                .with(matches::saddr("10.1.0.0/16".parse().unwrap()))
                .with(matches::l4proto(6))
                .with(matches::dport(80))
                .with([Expr::Load { dreg: Reg(1), value: ip("10.9.0.1") }])
                .with([Expr::Load { dreg: Reg(2), value: Value::new().port(8080) }])
                .expr(Expr::Nat {
                    kind: NatKind::Dnat,
                    family: IpFamily::V4,
                    addr: Some(Reg(1)),
                    port: Some(Reg(2)),
                    flags: 0,
                }),
        );
        b.add_rule(
            &t,
            "post",
            Rule::new()
                .with(matches::mark(0x4000, 0x4000))
                .expr(Expr::Masquerade { flags: nat_flags::FULLY_RANDOM }),
        );
        b.add_rule(
            &t,
            "in",
            Rule::new()
                .with(matches::ct_bits(CtKey::State, ct_state::ESTABLISHED | ct_state::RELATED))
                .verdict(Verdict::Accept),
        );
        b.add_rule(
            &t,
            "in",
            Rule::new().with(matches::iifname("lo")).expr(Expr::Counter).verdict(Verdict::Accept),
        );
        b.add_rule(
            &t,
            "in",
            Rule::new()
                .expr(Expr::Limit {
                    kind: LimitKind::Packets,
                    rate: 10,
                    per_seconds: 1,
                    burst: 5,
                    over: false,
                })
                .expr(Expr::Reject(RejectKind::PortUnreachable)),
        );
        b.add_rule(
            &t,
            "in",
            Rule::new().with(matches::set_mark_bits(0x4000)).with([Expr::meta(MetaKey::Mark, r)]),
        );
        socket.commit(&b).unwrap();

        let listing = nft(&["list", "ruleset"]);
        for line in [
            "comment \"version 1\"",
            "type nat hook prerouting priority dstnat; policy accept;",
            "type filter hook input priority filter; policy drop;",
            "fib daddr type local jump work comment \"to work\"",
            "ip saddr 10.1.0.0/16 tcp dport 80 dnat ip to 10.9.0.1:8080",
            "meta mark & 0x00004000 == 0x00004000 masquerade fully-random",
            "ct state established,related accept",
            "iifname \"lo\" counter packets 0 bytes 0 accept",
            "limit rate 10/second reject",
        ] {
            assert!(has_line(&listing, line), "no line {line:?} in\n{listing}");
        }
        assert!(socket.has_table(&t).unwrap());
        assert_eq!(socket.tables().unwrap()[0].comment.as_deref(), Some("version 1"));
        let rules = socket.rules(&t).unwrap();
        let named = rules.iter().find(|r| r.comment.as_deref() == Some("to work")).unwrap();
        assert_eq!(named.chain, "pre");

        let mut b = Batch::new();
        b.delete_rule(&t, "pre", named.handle);
        b.destroy_chain(&t, "work");
        b.destroy_chain(&t, "never-was");
        socket.commit(&b).unwrap();
        assert_eq!(socket.chains(&t).unwrap().len(), 3);

        let mut b = Batch::new();
        b.destroy_table(&t);
        socket.commit(&b).unwrap();
        assert_eq!(nft(&["list", "ruleset"]), "");
    });
}

#[test]
fn maps_with_a_random_slot_in_their_key_translate_and_are_listed_readably() {
    in_new_namespace(|socket| {
        let t = Table::new(Family::Ip, "orlop-test");
        let mut b = Batch::new();
        b.add_table(&t);
        b.add_chain(&t, Chain::regular("two-endpoints"));
        b.add_chain(&t, Chain::base("pre", ChainType::Nat, Hook::Prerouting, priority::DSTNAT));
        let service = [FieldType::Ipv4Addr, FieldType::InetProto, FieldType::InetService];
        let slotted = [FieldType::Ipv4Addr, FieldType::InetProto, FieldType::InetService, FieldType::Mark];
        b.add_set(&t, Set::verdict_map("services", &service).comment("by count"));
        b.add_set(&t, Set::map("endpoints", &slotted, &[FieldType::Ipv4Addr, FieldType::InetService]));
        let load_key =
            || [Expr::daddr(IpFamily::V4, Reg(0)), Expr::meta(MetaKey::L4Proto, Reg(1)), Expr::dport(Reg(2))];
        b.add_rule(
            &t,
            "pre",
            Rule::new().with(load_key()).expr(Expr::LookupVerdict { map: "services".into(), sreg: Reg(0) }),
        );
        b.add_rule(
            &t,
            "two-endpoints",
            Rule::new()
                .with(load_key())
                .expr(Expr::Numgen { kind: NumgenKind::Random, modulus: 2, offset: 0, dreg: Reg(3) })
                .expr(Expr::LookupMap { map: "endpoints".into(), sreg: Reg(0), dreg: Reg(8) })
                .expr(Expr::Nat {
                    kind: NatKind::Dnat,
                    family: IpFamily::V4,
                    addr: Some(Reg(8)),
                    port: Some(Reg(9)),
                    flags: 0,
                }),
        );
        let key = || ip("10.96.0.10").proto(17).port(53);
        b.add_elements(
            &t,
            "services",
            vec![Element::new(key()).verdict(Verdict::Goto("two-endpoints".into()))],
        );
        let endpoint = |slot, to: &str| Element::new(key().u32(slot)).data(ip(to).port(5353));
        b.add_elements(&t, "endpoints", vec![endpoint(0, "10.1.0.2"), endpoint(1, "10.1.1.2")]);
        socket.commit(&b).unwrap();

        let listing = nft(&["list", "ruleset"]);
        assert!(listing.contains("10.96.0.10 . udp . 53 : goto two-endpoints"), "{listing}");
        assert!(listing.contains("10.96.0.10 . udp . 53 . 0x00000001 : 10.1.1.2 . 5353"), "{listing}");
        assert!(listing.contains("vmap @services"), "{listing}");

        let back = socket.elements(&t, "endpoints").unwrap();
        assert_eq!(back.len(), 2);
        assert!(back.contains(&endpoint(1, "10.1.1.2")));
        let verdicts = socket.elements(&t, "services").unwrap();
        assert_eq!(verdicts[0].data, Some(ElementData::Verdict(Verdict::Goto("two-endpoints".into()))));

        let mut b = Batch::new();
        b.delete_elements(&t, "endpoints", vec![endpoint(0, "10.1.0.2")]);
        socket.commit(&b).unwrap();
        assert_eq!(socket.elements(&t, "endpoints").unwrap().len(), 1);
        assert_eq!(socket.sets(&t).unwrap().len(), 2);
    });
}

#[test]
fn interval_dynamic_and_other_sets_are_listed_as_meant() {
    in_new_namespace(|socket| {
        let t = Table::new(Family::Inet, "orlop-test");
        let mut b = Batch::new();
        b.add_table(&t);
        b.add_chain(&t, Chain::regular("c"));
        b.add_set(&t, Set::new("nets", &[FieldType::Ipv4Addr]).interval());
        b.add_set(&t, Set::new("nets6", &[FieldType::Ipv6Addr]).interval());
        b.add_set(&t, Set::new("pairs", &[FieldType::Ipv4Addr, FieldType::InetService]).interval());
        b.add_set(&t, Set::new("recent", &[FieldType::Ipv4Addr]).dynamic(Some(60_000)).size(1024));
        b.add_set(&t, Set::map("marks", &[FieldType::Mark], &[FieldType::Mark]));
        b.add_set(&t, Set::new("links", &[FieldType::IfName]));
        b.add_set(
            &t,
            Set::map(
                "ports",
                &[FieldType::InetProto, FieldType::InetService],
                &[FieldType::Ipv4Addr, FieldType::InetService],
            ),
        );
        b.add_elements(
            &t,
            "nets",
            ["10.0.0.0/8", "11.0.0.0/8", "192.168.7.0/24", "255.0.0.0/8"]
                .map(|n| Element::net(n.parse().unwrap()))
                .to_vec(),
        );
        b.add_elements(&t, "nets6", vec![Element::net("fd00:1::/64".parse().unwrap())]);
        b.add_elements(&t, "pairs", vec![Element::range(ip("10.0.0.1").port(80), ip("10.0.0.9").port(90))]);
        b.add_elements(&t, "marks", vec![Element::new(Value::of_u32(5)).data(Value::of_u32(7))]);
        b.add_elements(&t, "links", vec![Element::new(Value::new().ifname("eth0"))]);
        b.add_elements(
            &t,
            "ports",
            vec![Element::new(Value::new().proto(6).port(80)).data(ip("10.0.0.1").port(8080))],
        );
        b.add_rule(
            &t,
            "c",
            Rule::new()
                .with(matches::family(IpFamily::V4))
                .expr(Expr::saddr(IpFamily::V4, Reg(0)))
                .expr(Expr::Lookup { set: "nets".into(), sreg: Reg(0), inverted: true })
                .expr(Expr::Dynset {
                    set: "recent".into(),
                    op: DynsetOp::Update,
                    key: Reg(0),
                    data: None,
                    timeout_ms: Some(30_000),
                })
                .verdict(Verdict::Drop),
        );
        socket.commit(&b).unwrap();
        let listing = nft(&["list", "ruleset"]);
        for part in [
            "10.0.0.0/8, 11.0.0.0/8,",
            "192.168.7.0/24, 255.0.0.0/8",
            "fd00:1::/64",
            "10.0.0.1-10.0.0.9 . 80-90",
            "0x00000005 : 0x00000007",
            "\"eth0\"",
            "tcp . 80 : 10.0.0.1 . 8080",
            "ip saddr != @nets update @recent { ip saddr timeout 30s } drop",
            "timeout 1m",
        ] {
            assert!(listing.contains(part), "no {part:?} in\n{listing}");
        }
        assert_eq!(
            socket.elements(&t, "pairs").unwrap()[0].end,
            Some(RangeEnd::Fields(ip("10.0.0.9").port(90)))
        );
        let mut b = Batch::new();
        b.delete_elements(&t, "nets", vec![Element::net("10.0.0.0/8".parse().unwrap())]);
        b.flush_set(&t, "pairs");
        socket.commit(&b).unwrap();
        let listing = nft(&["list", "set", "inet", "orlop-test", "nets"]);
        assert!(!listing.contains("10.0.0.0/") && listing.contains("11.0.0.0/8"), "{listing}");
        assert!(socket.elements(&t, "pairs").unwrap().is_empty());
    });
}

#[test]
fn fifty_thousand_elements_fit_one_transaction() {
    in_new_namespace(|socket| {
        let t = Table::new(Family::Ip, "orlop-test");
        let mut b = Batch::new();
        b.add_table(&t);
        b.add_set(&t, Set::map("m", &[FieldType::Ipv4Addr, FieldType::Mark], &[FieldType::Ipv4Addr]));
        let element =
            |i: u32| Element::new(Value::of_ip(Ipv4Addr::from(i).into()).u32(i % 10)).data(ip("1.2.3.4"));
        b.add_elements(&t, "m", (0..50_000).map(element).collect());
        let started = std::time::Instant::now();
        socket.commit(&b).unwrap();
        println!("committed in {:?}", started.elapsed());
        assert_eq!(socket.elements(&t, "m").unwrap().len(), 50_000);
    });
}

#[test]
fn a_refusal_names_the_object_and_changes_nothing() {
    in_new_namespace(|socket| {
        let t = Table::new(Family::Ip, "orlop-test");
        let mut b = Batch::new();
        b.add_table(&t);
        b.add_rule(&t, "missing", Rule::new().verdict(Verdict::Accept).comment("who am i"));
        let error = socket.commit(&b).unwrap_err();
        assert!(error.is_not_found());
        assert!(error.to_string().contains("add rule ip orlop-test missing \"who am i\""), "{error}");
        assert!(socket.tables().unwrap().is_empty());

        let mut b = Batch::new();
        b.add_table(&t);
        b.add_set(&t, Set::new("s", &[FieldType::Ipv4Addr]));
        b.add_elements(&t, "s", vec![Element::new(ip("10.0.0.1"))]);
        socket.commit(&b).unwrap();
        let mut b = Batch::new();
        b.delete_elements(&t, "s", vec![Element::new(ip("10.0.0.1")), Element::new(ip("10.0.0.2"))]);
        let error = socket.commit(&b).unwrap_err();
        assert!(error.to_string().contains("delete element ip orlop-test s 0a000002"), "{error}");
        assert_eq!(socket.elements(&t, "s").unwrap().len(), 1);

        let mut b = Batch::new();
        b.add_elements(&t, "s", vec![Element::new(Value::raw(&[1]))]);
        assert!(socket.commit(&b).is_err());
        assert!(socket.elements(&Table::new(Family::Ip, "nope"), "s").unwrap_err().is_not_found());
        // The socket still works after refusals.
        let mut b = Batch::new();
        b.delete_table(&t);
        socket.commit(&b).unwrap();
        assert!(socket.commit(&b).unwrap_err().is_not_found());
    });
}
