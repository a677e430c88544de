// Package checkpoint keeps the saved processes of this node's apps on its
// disk: directories by app and key. It does not know what is in them, nor who
// saves and restores processes.
//
// It promises:
//
//   - A checkpoint is there whole or not at all, also after a crash and on a
//     full disk.
//   - What Find gives is what Make was given: each file is read through once in
//     the life of a process, and looked at each time.
//   - What somebody holds stays where it is, whatever is removed meanwhile: it
//     may be the layer of a root filesystem. It goes with its last hold.
//   - All together take no more than the budget; those that were not used for
//     longest go first.
//   - A key that was refused stays refused, also after a restart.
//
// On disk, below the store's directory. That is root's alone, because saved
// memory has secrets in it and the files inside have owners and modes of their
// own:
//
//	kept/NAME/content        what was saved; NAME is APP.KEY.CHANCE
//	kept/NAME/manifest.json  its files; in time, when it was used last
//	kept/NAME/doomed.json    the same of one that goes when nobody holds it
//	refused/APP.KEY.json     why that key is not to be tried again
//	tmp/NAME                 what is being made; emptied by Open
//	trash/NAME               what is being removed; emptied by Open
//
// A checkpoint has one NAME in its life, only the directory that it stands in
// changes. One Store at a time owns them all.
//
// It never opens what is not a regular file or a directory, never follows a
// link, and runs nothing.
//
// Start reading at Store in store.go; make.go and remove.go are how a
// checkpoint comes and goes, tree.go is how it is verified.
package checkpoint
