use super::*;

const FIRST: &str = r#"# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a \"b\" }c"} 3.0
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0"} 12.0 1700000000000
# HELP vllm:prompt_tokens_created Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_created gauge
vllm:prompt_tokens_created{engine="0"} 1.7e+09
# HELP t Seconds.
# TYPE t histogram
t_bucket{le="0.1"} 1.0
t_bucket{le="+Inf"} 2.0
t_count 2.0
t_sum 0.5
t_created 1.7e+09
"#;

fn merged(nodes: &[(&str, &str)]) -> String {
    let texts: Vec<_> = nodes
        .iter()
        .map(|(node, text)| (*node, Bytes::copy_from_slice(text.as_bytes())))
        .collect();
    let mut families = Families::default();
    for (node, text) in &texts {
        assert!(families.add(node, text));
    }
    let mut out = String::new();
    families.write(&mut out);
    out
}

#[test]
fn each_sample_gets_its_node_and_each_family_is_there_once() {
    let second = "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 1\n";
    let text = merged(&[("p\"0", FIRST), ("d", second)]);
    let expected = r#"# HELP t Seconds.
# TYPE t histogram
t_bucket{node="p\"0",le="0.1"} 1.0
t_bucket{node="p\"0",le="+Inf"} 2.0
t_count{node="p\"0"} 2.0
t_sum{node="p\"0"} 0.5
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{node="p\"0",engine="0",model_name="a \"b\" }c"} 3.0
vllm:num_requests_running{node="d"} 1
# HELP vllm:prompt_tokens Number of prefill tokens processed.
# TYPE vllm:prompt_tokens counter
vllm:prompt_tokens_total{node="p\"0",engine="0"} 12.0
"#;
    assert_eq!(text, expected);
}

#[test]
fn a_node_s_own_label_is_renamed_and_it_cannot_speak_for_us() {
    let text = "# TYPE a gauge\na{node=\"x\",b=\"y\"} 1\n# TYPE pegaflow_router_in_flight gauge\npegaflow_router_in_flight 7\n";
    assert_eq!(
        merged(&[("d", text)]),
        "# TYPE a gauge\na{node=\"d\",exported_node=\"x\",b=\"y\"} 1\n"
    );
}

#[test]
fn what_is_no_sample_is_left_out() {
    let lines = [
        "a",
        "a x",
        "a{ 1",
        "a{b} 1",
        "a{b=\"} 1",
        "a{b=\"c\\\"} 1",
        "a{1b=\"c\"} 1",
        "a{b=\"c\"}",
        "b 1",
        "a_total 1",
        "{} 1",
        "# EOF",
        "#",
        "é 1",
    ];
    for line in lines {
        let text = format!("# TYPE a gauge\n{line}\na 2\n");
        assert_eq!(
            merged(&[("d", &text)]),
            "# TYPE a gauge\na{node=\"d\"} 2\n",
            "{line}"
        );
    }
    assert_eq!(merged(&[("d", "a 1\n"), ("e", "")]), "", "of no family");
    assert!(!Families::default().add("d", &Bytes::from_static(b"\xff")));
}

#[test]
fn what_openmetrics_already_is_stays_so() {
    let text = "# TYPE a counter\na_total 1\na_created 5\n# TYPE b unknown\nb NaN\n# TYPE c summary\nc{quantile=\"0.5\"} 1\nc_sum 2\nc_count 1\n# EOF\n";
    let expected = "# TYPE a counter\na_total{node=\"d\"} 1\n# TYPE b unknown\nb{node=\"d\"} NaN\n# TYPE c summary\nc{node=\"d\",quantile=\"0.5\"} 1\nc_sum{node=\"d\"} 2\nc_count{node=\"d\"} 1\n";
    assert_eq!(merged(&[("d", text)]), expected);
}

#[test]
fn nodes_that_do_not_agree_make_no_family_twice() {
    let nodes = [
        (
            "old",
            "# TYPE a_total counter\na_total 1\n# TYPE b_total gauge\nb_total 1\n",
        ),
        ("new", "# TYPE a counter\na_total 2\n"),
        ("odd", "# TYPE a gauge\na 3\n# TYPE c counter\nc 4\n"),
    ];
    let expected = "# TYPE a counter\na_total{node=\"old\"} 1\na_total{node=\"new\"} 2\n\
        # TYPE b_total gauge\nb_total{node=\"old\"} 1\n";
    assert_eq!(merged(&nodes), expected);
}
