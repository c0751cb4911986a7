import { key } from "../key";
import { ended, heard, link, second, status } from "../store";
import { duration } from "../format";
import { Actions } from "./actions";
import { Charts } from "./charts";
import { Header } from "./header";
import { History } from "./history";
import { KeyPage } from "./keypage";
import { Logs } from "./logs";
import { Requests } from "./requests";
import { Tiles } from "./tiles";
import { Topology } from "./topology";

function banner(): string {
  if (link.value === "live") return ended.value ? "pegaflow is stopping." : "";
  const before = ended.value ? "pegaflow has stopped. " : "";
  // Nothing was there yet, so nothing was lost.
  if (status.value === null) return link.value === "lost" ? "pegaflow cannot be reached; trying again." : "";
  const since = duration((second.value - heard.value) / 1000);
  return `${before}Connection lost, ${since} ago; trying again. What is shown is as it was then.`;
}

function Banner() {
  const text = banner();
  return (
    <div class={text ? "banner" : "banner none"} role="status">
      {text}
    </div>
  );
}

function Dashboard() {
  const stale = link.value !== "live" && status.value !== null;
  return (
    <>
      <a class="skip" href="#main">Skip to the content</a>
      <div class="head">
        <Header />
        <Banner />
      </div>
      <main id="main" tabIndex={-1} class={stale ? "stale" : ""}>
        {status.value === null ? (
          <p class="waiting">Connecting to pegaflow …</p>
        ) : (
          <>
            <Topology />
            <Tiles />
            <Charts />
            <Requests />
            <History />
            <Logs />
          </>
        )}
      </main>
      <Actions />
    </>
  );
}

export function App() {
  return key.value === null ? <KeyPage /> : <Dashboard />;
}
