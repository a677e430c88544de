package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/fastcontainer/fastcontainer/internal/e2e/realapps"
	"github.com/fastcontainer/fastcontainer/internal/events"
	"github.com/fastcontainer/fastcontainer/internal/fleet"
)

// criuProgram is where hack/criu.sh puts it.
const criuProgram = "/usr/local/lib/fastcontainer/criu/criu"

// What is added to a daemon's configuration: one saves processes, the other
// never does, so that no checkpoint is made while something else is measured.
const (
	saves      = "checkpoint: {criu: " + criuProgram + "}\n"
	neverSaves = "checkpoint: {criu: \"\"}\n"
)

// tarballs is where those of the real apps are kept.
const tarballs = ".cache/rootfs"

// program is one whose starts are measured.
type program struct {
	realapps.App
	label, image string
	// warm is asked once before its processes are saved.
	warm string
}

// program of the light real apps, by its name.
func (b *bench) light(name, label, warm string) (program, error) {
	tar, err := realapps.Debian(b.ctx, tarballs)
	if err != nil {
		return program{}, err
	}
	if b.site == nil {
		dir, err := os.MkdirTemp(b.dir, "site")
		if err != nil {
			return program{}, err
		}
		if b.site, err = realapps.Make(b.ctx, dir); err != nil {
			return program{}, err
		}
	}
	i := slices.IndexFunc(b.site, func(a realapps.App) bool { return a.Name == name })
	if i < 0 {
		return program{}, fmt.Errorf("there is no real app %s", name)
	}
	return program{App: b.site[i], label: label, image: "tar:" + tar, warm: warm}, nil
}

func (b *bench) node() (program, error) { return b.light("express", "Node, express", "/") }

// programs are all of them, from the quickest to the slowest; end stops the
// database that one of them needs.
func (b *bench) programs() (all []program, end func() error, err error) {
	all = []program{{App: realapps.App{Name: "static", Want: hello, Command: []string{"/server"}}, label: "static Go server", image: "dir:" + b.root}}
	for _, l := range [][3]string{{"nginx", "nginx", ""}, {"php", "PHP, Apache", "/"}, {"express", "Node, express", "/"}, {"flask", "Python, Flask", ""}} {
		p, err := b.light(l[0], l[1], l[2])
		if err != nil {
			return nil, nil, err
		}
		all = append(all, p)
	}
	tar, err := realapps.Heavy(b.ctx, tarballs)
	if err != nil {
		return nil, nil, err
	}
	dir, err := os.MkdirTemp(b.dir, "db")
	if err != nil {
		return nil, nil, err
	}
	db, err := realapps.StartMariaDB(b.ctx, tar, dir)
	if err != nil {
		return nil, nil, err
	}
	for _, p := range []program{{App: realapps.JVM(), label: "JVM, Jetty"}, {App: realapps.WordPress(db), label: "WordPress, Apache"}, {App: realapps.Rails(), label: "Rails, Puma"}} {
		p.image, p.warm = "tar:"+tar, "/"
		all = append(all, p)
	}
	return all, db.Close, nil
}

// cast deploys an app of a program.
func (n *node) cast(name string, p program, start fleet.StartPolicy, change func(*fleet.Spec)) error {
	return n.deploy(n.b.ctx, name, func(s *fleet.Spec) {
		s.Image, s.Command, s.Volumes, s.Start = p.image, p.Command, p.Volumes, start
		s.Resources.Memory.Rest = 512 << 20
		s.StopSignal = "KILL" // how long it takes to end is its own affair
		if start == fleet.StartCheckpoint {
			s.Warm = p.warm
		}
		if change != nil {
			change(s)
		}
	})
}

// asleep ends an app's instances, and waits until what that leaves to be done
// does not cost the next start.
func (n *node) asleep(name string) error {
	app := fleet.AppName(name)
	if err := errors.Join(n.client.SetStopped(n.b.ctx, app, true), n.gone(app), n.client.SetStopped(n.b.ctx, app, false)); err != nil {
		return err
	}
	time.Sleep(100 * time.Millisecond)
	return nil
}

func (n *node) gone(app fleet.AppName) error {
	err := until(time.Minute, func() bool {
		list, err := n.client.Instances(n.b.ctx, app)
		return err == nil && len(list) == 0
	})
	if err != nil {
		return fmt.Errorf("end instances of %s: %w", app, err)
	}
	return nil
}

// frozen waits until an app's one instance is a standby, and a moment more.
func (n *node) frozen(app fleet.AppName) error {
	err := until(time.Minute, func() bool {
		list, err := n.client.Instances(n.b.ctx, app)
		return err == nil && len(list) == 1 && list[0].State == fleet.StateStandby
	})
	if err != nil {
		return fmt.Errorf("freeze %s: %w", app, err)
	}
	time.Sleep(50 * time.Millisecond)
	return nil
}

// held is what an instance of that kind held, and its saved processes take, as
// far as the daemon knows.
func (n *node) held(app fleet.AppName, kind fleet.StartKind) (memory, disk int64, err error) {
	detail, err := n.client.App(n.b.ctx, app)
	for _, s := range detail.Starts {
		if s.Kind == kind {
			memory, disk = s.Memory, s.Disk
		}
	}
	return memory, disk, err
}

// saved waits until an app's processes are saved, and gives what they take of
// the disk.
func (n *node) saved(app fleet.AppName) (disk int64, err error) {
	var failure error
	err = until(2*time.Minute, func() bool {
		detail, err := n.client.App(n.b.ctx, app)
		if err != nil {
			failure = err
			return true
		}
		for _, s := range detail.Starts {
			if s.Kind == fleet.CheckpointStart && s.Disk > 0 {
				disk = s.Disk
				return true
			}
		}
		for _, e := range detail.Events {
			if e.Type == fleet.EventCheckpoint && !strings.Contains(e.Detail, " in ") {
				failure = fmt.Errorf("%s: %s %q", e.Cause, e.Detail, e.Log)
				return true
			}
		}
		return false
	})
	if err := errors.Join(err, failure); err != nil {
		return 0, fmt.Errorf("save %s: %w", app, err)
	}
	return disk, nil
}

// were checks of what kind the last starts of an app were.
func (n *node) were(app fleet.AppName, kind fleet.StartKind, count int) error {
	var kinds []fleet.StartKind
	var why []string
	err := n.client.Events(n.b.ctx, app, events.From{Last: 100000}, false, func(e fleet.Event) error {
		switch e.Type {
		case fleet.EventReady, fleet.EventThaw:
			kinds = append(kinds, e.Kind)
		case fleet.EventCheckpoint:
			why = append(why, e.Cause+": "+e.Detail)
		default:
		}
		return nil
	})
	if err != nil {
		return err
	}
	last := kinds[max(len(kinds)-count, 0):]
	if len(last) < count || slices.ContainsFunc(last, func(k fleet.StartKind) bool { return k != kind }) {
		return fmt.Errorf("of %s the last %d starts were to be of kind %s: %v %q", app, count, kind, kinds, why)
	}
	return nil
}

// starts asks a program while it is asleep, again and again; the first time
// fills the page cache and does not count.
func (n *node) starts(name string, p program, kind fleet.StartKind, rounds int) (times, error) {
	var took times
	for round := range rounds + 1 {
		if err := n.asleep(name); err != nil {
			return nil, err
		}
		d, err := ask(n.http, name+".localhost", p.Want)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if round > 0 {
			took = append(took, d)
		}
	}
	if err := n.asleep(name); err != nil { // its events are there, then
		return nil, err
	}
	return took, n.were(fleet.AppName(name), kind, rounds+1)
}

// lives is what came out for one program.
type lives struct {
	cold, restored, thawed, warm times
	memory, disk                 int64
}

// above is what a thaw takes longer than a warm answer.
func (l *lives) above(share float64) time.Duration { return l.thawed.at(share) - l.warm.at(share) }

func (l *lives) measure(n, saver *node, p program, rounds int) error {
	if err := l.colds(n, p, rounds); err != nil {
		return err
	}
	if err := l.restores(saver, p, rounds); err != nil {
		return err
	}
	return l.thaws(n, p, rounds)
}

// colds measures a program's cold starts.
func (l *lives) colds(n *node, p program, rounds int) (err error) {
	name := p.Name + "-cold"
	if err := n.cast(name, p, fleet.StartCold, nil); err != nil {
		return err
	}
	if l.cold, err = n.starts(name, p, fleet.ColdStart, rounds); err != nil {
		return err
	}
	return n.client.Delete(n.b.ctx, fleet.AppName(name), true)
}

// restores measures its starts from saved processes.
func (l *lives) restores(n *node, p program, rounds int) (err error) {
	name := p.Name + "-saved"
	if err := n.cast(name, p, fleet.StartCheckpoint, nil); err != nil {
		return err
	}
	if _, err := ask(n.http, name+".localhost", p.Want); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if l.disk, err = n.saved(fleet.AppName(name)); err != nil {
		return err
	}
	if l.restored, err = n.starts(name, p, fleet.CheckpointStart, rounds); err != nil {
		return err
	}
	return n.client.Delete(n.b.ctx, fleet.AppName(name), true)
}

// thaws measures its thaws, and in turn with them the answers of an instance
// that is awake and was left alone for as long: what a processor has forgotten
// of a program meanwhile is no part of a thaw.
func (l *lives) thaws(n *node, p program, rounds int) (err error) {
	names := map[bool]string{false: p.Name + "-standby", true: p.Name + "-awake"}
	standby := fleet.AppName(names[false])
	if err := n.cast(names[false], p, fleet.StartStandby, func(s *fleet.Spec) { s.Idle = fleet.Duration(100 * time.Millisecond) }); err != nil {
		return err
	}
	if err := n.cast(names[true], p, fleet.StartCold, nil); err != nil {
		return err
	}
	for round := range rounds + used {
		if err := n.frozen(standby); err != nil {
			return err
		}
		for _, awake := range []bool{round%2 == 0, round%2 != 0} {
			d, err := ask(n.http, names[awake]+".localhost", p.Want)
			switch {
			case err != nil:
				return fmt.Errorf("%s: %w", names[awake], err)
			case round < used:
			case awake:
				l.warm = append(l.warm, d)
			default:
				l.thawed = append(l.thawed, d)
			}
		}
	}
	if l.memory, _, err = n.held(standby, fleet.StandbyStart); err != nil {
		return err
	}
	if err := n.were(standby, fleet.StandbyStart, rounds+used); err != nil {
		return err
	}
	return errors.Join(n.client.Delete(n.b.ctx, standby, true), n.client.Delete(n.b.ctx, fleet.AppName(names[true]), true))
}

// used is how often an instance has answered before its thaws and warm answers
// are measured.
const used = 5

// kinds: what the three kinds of start of real programs take.
func (b *bench) kinds() (err error) {
	rounds := 30
	if b.quick {
		rounds = 5
	}
	all, end, err := b.programs()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	n, err := b.start("", neverSaves)
	if err != nil {
		return err
	}
	defer n.end()
	saver, err := b.start("", saves)
	if err != nil {
		return err
	}
	defer saver.end()
	b.say("## Kinds of start\n")
	b.say("A request to an app that is asleep (a new connection, through the front door) to the last byte of its answer, %d starts of each kind, each answer", rounds)
	b.say("checked. *cold*: the program is started; *checkpoint*: its saved processes are restored (of PHP, Node and the last three after they were asked once:")
	b.say("`warm`); *standby*: its frozen instance is thawed; *warm*: in turn with that, an instance that is awake and was left alone for as long. Times in ms,")
	b.say("p50 / p99; *above warm* is the difference of the quantiles. *memory* is what a frozen instance holds, *disk* what its saved processes take.\n")
	b.say("| app | warm | cold | checkpoint | standby | standby above warm | memory MiB | disk MiB |\n|---|---|---|---|---|---|---|---|")
	out := map[string]*lives{}
	for _, p := range all {
		l := &lives{}
		if err := l.measure(n, saver, p, rounds); err != nil {
			return err
		}
		b.say("| %s | %s | %s | %s | %s | %s / %s | %s | %s |", p.label, l.warm.both(), l.cold.both(), l.restored.both(), l.thawed.both(),
			ms(l.above(.5)), ms(l.above(.99)), mib(l.memory), mib(l.disk))
		out[p.Name] = l
	}
	slow := func(share float64, most time.Duration) (names []string) {
		for _, p := range all {
			if out[p.Name].above(share) > most {
				names = append(names, p.Name)
			}
		}
		return names
	}
	b.say("\nAimed at: standby above the app's own warm answer p50 ≤ 2 ms (%s) and p99 ≤ 8 ms (%s) for every app.", verdictOf(slow(.5, 2*time.Millisecond)), verdictOf(slow(.99, 8*time.Millisecond)))
	rails := out["rails"]
	b.say("Checkpoint: Node's p50 ≤ 40 ms (%s), Rails' at most a tenth of its cold one (%s), WordPress' under 80 ms (%s).\n", verdict(out["express"].restored.at(.5) <= 40*time.Millisecond),
		verdict(10*rails.restored.at(.5) <= rails.cold.at(.5)), verdict(out["wordpress"].restored.at(.5) < 80*time.Millisecond))
	return nil
}

// both quantiles that the tables have.
func (t times) both() string { return ms(t.at(.5)) + " / " + ms(t.at(.99)) }

func mib(n int64) string { return fmt.Sprintf("%.1f", float64(n)/(1<<20)) }

// verdictOf names those that missed an aim.
func verdictOf(missed []string) string {
	if len(missed) == 0 {
		return verdict(true)
	}
	return verdict(false) + " by " + strings.Join(missed, ", ")
}

// siblings: ten instances that are restored at once, beside one.
func (b *bench) siblings() error {
	const many = 10
	rounds := 15
	if b.quick {
		rounds = 5
	}
	p, err := b.node()
	if err != nil {
		return err
	}
	n, err := b.start("", saves)
	if err != nil {
		return err
	}
	defer n.end()
	name := func(count int) string { return fmt.Sprintf("siblings-%d", count) }
	for _, count := range []int{1, many} {
		if err := n.cast(name(count), p, fleet.StartCheckpoint, func(s *fleet.Spec) { s.Scale = fleet.Scale{Min: count, Max: count} }); err != nil {
			return err
		}
		if _, err := n.saved(fleet.AppName(name(count))); err != nil {
			return err
		}
		if err := n.client.SetStopped(b.ctx, fleet.AppName(name(count)), true); err != nil {
			return err
		}
	}
	took := map[int]times{}
	for round := range rounds + 1 {
		for _, count := range []int{1, many} {
			d, err := n.together(name(count), count, p.Want)
			if err != nil {
				return err
			}
			if round > 0 {
				took[count] = append(took[count], d)
			}
		}
	}
	for _, count := range []int{1, many} {
		if err := n.were(fleet.AppName(name(count)), fleet.CheckpointStart, rounds*count); err != nil {
			return err
		}
	}
	one, ten := took[1], took[many]
	b.say("## Ten siblings\n")
	b.say("Node with express (`scale.min`), its saved processes restored: from the decision to start until the last of them is ready, %d rounds in turn.\n", rounds)
	b.say("| instances | p50 ms | p99 ms | beside one |\n|---|---|---|---|")
	b.say("| 1 | %s | %s | 1.00 |\n| %d | %s | %s | %.2f |", ms(one.at(.5)), ms(one.at(.99)), many, ms(ten.at(.5)), ms(ten.at(.99)), ten.beside(one, .5))
	b.say("\nAimed at: at most 3 times one (%s).\n", verdict(ten.beside(one, .5) <= 3))
	return nil
}

// together starts so many instances of a stopped app at once and stops it
// again. It tells how long it took from the first start's event until the last
// one was ready.
func (n *node) together(name string, count int, want string) (time.Duration, error) {
	app := fleet.AppName(name)
	if err := n.gone(app); err != nil {
		return 0, err
	}
	time.Sleep(300 * time.Millisecond) // sandboxes are prepared again
	asked := time.Now()
	if err := n.client.SetStopped(n.b.ctx, app, false); err != nil {
		return 0, err
	}
	time.Sleep(250 * time.Millisecond) // to look costs processor time, too
	var first, last time.Time
	err := until(30*time.Second, func() bool {
		time.Sleep(100 * time.Millisecond)
		first, last = time.Time{}, time.Time{}
		ready := 0
		err := n.client.Events(n.b.ctx, app, events.From{Last: 10 * count}, false, func(e fleet.Event) error {
			switch {
			case e.Time.Before(asked):
			case e.Type == fleet.EventStart && first.IsZero():
				first = e.Time
			case e.Type == fleet.EventReady:
				ready++
				if e.Time.After(last) {
					last = e.Time
				}
			default:
			}
			return nil
		})
		return err == nil && ready >= count
	})
	if err != nil {
		return 0, fmt.Errorf("start %d instances of %s: %w", count, name, err)
	}
	if _, err := ask(n.http, name+".localhost", want); err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return last.Sub(first), n.client.SetStopped(n.b.ctx, app, true)
}

// thousand: what apps cost that each have a frozen instance.
func (b *bench) thousand() error {
	all, span, rest := 1000, 4*time.Second, 20*time.Second
	if b.quick {
		all, span, rest = 200, 2*time.Second, 5*time.Second
	}
	n, err := b.start("", neverSaves+"capacity: {standby: 0.9}\n")
	if err != nil {
		return err
	}
	defer n.end()
	other, err := b.start("", neverSaves) // without, to compare with
	if err != nil {
		return err
	}
	defer other.end()
	for _, n := range []*node{n, other} {
		if err := b.awake(n, "warm"); err != nil {
			return err
		}
	}
	_, taken := kernel()
	began := time.Now()
	for i := range all {
		if err := n.deploy(b.ctx, fmt.Sprintf("s%d", i), func(s *fleet.Spec) {
			s.Start, s.Idle = fleet.StartStandby, fleet.Duration(100*time.Millisecond)
			s.Resources.Memory.Rest = 64 << 20
		}); err != nil {
			return err
		}
	}
	if err := n.allFrozen(all); err != nil {
		return err
	}
	frozen := time.Since(began)
	time.Sleep(15 * time.Second) // what was prepared for so many starts goes away again, ten a second
	_, taken1 := kernel()
	used := b.resting(rest, n, other)
	if err := n.allFrozen(all); err != nil {
		return err
	}
	without, with, err := b.paces(other, n, span)
	if err != nil {
		return err
	}
	var thawed times
	for i := range min(all, 100) {
		d, err := get(n.http, fmt.Sprintf("s%d.localhost", i*all/min(all, 100)))
		if err != nil {
			return err
		}
		thawed = append(thawed, d)
	}
	b.say("## %d standbys\n", all)
	b.say("As many apps of the static server with `start: standby`, each with its frozen instance. The daemon's processor time is that of it and its own")
	b.say("processes over %.0f s in which nobody asks. The warm rates are those of one more app, which is awake: the best of %d loads of each of two daemons in turn,", rest.Seconds(), loads)
	b.say("one without standbys.\n")
	b.say("| | |\n|---|---|")
	b.say("| from the first deploy until all were frozen | %.1f s |", frozen.Seconds())
	b.say("| the daemon's processor time at rest | %.2f %% of a core |", 100*used[0])
	b.say("| the same without standbys | %.2f %% of a core |", 100*used[1])
	b.say("| what the machine has less available, for a standby | %.0f KiB |", (taken1-taken)/float64(all))
	b.say("| warm requests/s without standbys | %.0f |", without.rate)
	b.say("| warm requests/s with %d standbys | %.0f (%+.1f %%) |", all, with.rate, 100*(with.rate/without.rate-1))
	b.say("| first request to one of them, p50 / p99 of %d | %s ms |", len(thawed), thawed.both())
	b.say("\nAimed at: at most 1 %% of a core (%s), warm within 3 %% (%s).\n", verdict(used[0] <= .01), verdict(with.rate >= .97*without.rate))
	return nil
}

// resting is the share of a core that daemons use meanwhile, each with its own
// processes.
func (b *bench) resting(span time.Duration, nodes ...*node) []float64 {
	used := make([]float64, len(nodes))
	for i, n := range nodes {
		used[i] = -busy(n.cmd.Process.Pid).Seconds()
	}
	time.Sleep(span)
	for i, n := range nodes {
		used[i] = (used[i] + busy(n.cmd.Process.Pid).Seconds()) / span.Seconds()
	}
	return used
}

// allFrozen waits until so many apps have a frozen instance, and checks that.
func (n *node) allFrozen(count int) error {
	var have int
	err := until(2*time.Minute, func() bool {
		time.Sleep(500 * time.Millisecond)
		apps, err := n.client.Apps(n.b.ctx)
		have = 0
		for _, a := range apps {
			have += a.Standbys
		}
		return err == nil && have >= count
	})
	if err != nil {
		return fmt.Errorf("%d of %d standbys: %w", have, count, err)
	}
	list, err := n.client.Instances(n.b.ctx, "")
	if err != nil {
		return err
	}
	have = 0
	for _, i := range list {
		if i.State == fleet.StateStandby {
			have++
		}
	}
	if have != count {
		return fmt.Errorf("%d of %d instances are frozen", have, count)
	}
	return nil
}
