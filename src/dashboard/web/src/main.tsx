import { render } from "preact";
import "uplot/dist/uPlot.min.css";
import "./css/main.css";
import { findKey } from "./key";
import { second } from "./store";
import { connect } from "./stream";
import { applyTheme } from "./theme";
import { App } from "./ui/app";

applyTheme();
findKey();
connect();
setInterval(() => (second.value = Date.now()), 1000);
render(<App />, document.getElementById("app")!);
