//! Several models in one topology.

use std::fs;

use serde_json::{Value, json};

use crate::support::client::{Ending, completion, is_proven};
use crate::support::{self, Site};

#[tokio::test(flavor = "multi_thread")]
async fn two_models_are_split_each_on_its_own_nodes() {
    let site = Site::new();
    fs::create_dir(site.path("other")).unwrap();
    fs::copy(
        site.path("model/config.json"),
        site.path("other/config.json"),
    )
    .unwrap();
    let second = ["prefill", "decode"].map(|role| {
        format!(
            "\n[[node]]\nname = \"{role}-other\"\nrole = \"{role}\"\npool = \"other\"\n\
             model = \"./other\"\nserved_model_name = \"big\"\n"
        )
    });
    let alias = "\n[router]\naliases = { \"gpt-4o\" = \"big\" }\n";
    let text = support::topology(site.port).replacen("\n[router]\n", alias, 1);
    site.topology(&(text + &second.concat()));
    let up = site.up_ready().await;
    for node in ["prefill", "decode", "prefill-other", "decode-other"] {
        up.wait_for_node(node, is_proven).await;
    }
    assert!(up.output().contains("model: big, tiny"), "{}", up.output());
    let models: Value = serde_json::from_str(&up.get("/v1/models").await).unwrap();
    let names: Vec<_> = models["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| &model["id"])
        .collect();
    assert_eq!(names, ["big", "gpt-4o", "tiny"]);

    let legs = async |node: &str, model: &str| {
        let labels = format!("engine=\"0\",model_name=\"{model}\",leg=\"decode\"");
        up.node_metric(node, &format!("vllm:fake_legs_total{{{labels}}}"))
            .await
    };
    let both = async || {
        (
            legs("decode", "tiny").await,
            legs("decode-other", "big").await,
        )
    };
    let before = both().await;
    for (model, node) in [
        ("big", "decode-other"),
        ("gpt-4o", "decode-other"),
        ("tiny", "decode"),
    ] {
        let mut body = completion(7, 100, 8);
        body["model"] = json!(model);
        let hits = "vllm:external_prefix_cache_hits_total";
        let loaded = up.node_metric(node, hits).await;
        assert_eq!(up.generate(&body).await.ending, Ending::Complete, "{model}");
        assert_eq!(up.node_metric(node, hits).await - loaded, 96.0, "{model}");
    }
    let after = both().await;
    assert_eq!((after.0 - before.0, after.1 - before.1), (1.0, 2.0));

    let mut body = completion(8, 100, 8);
    body["model"] = json!("huge");
    let ending = up.generate(&body).await.ending;
    assert!(
        matches!(&ending, Ending::Refused(why) if why.contains("404") && why.contains("`big`"))
    );
    body.as_object_mut().unwrap().remove("model");
    let ending = up.generate(&body).await.ending;
    assert!(
        matches!(&ending, Ending::Refused(why) if why.contains("400") && why.contains("`tiny`"))
    );
    up.stop().await;
}
