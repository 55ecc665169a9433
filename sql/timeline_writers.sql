-- read
--
-- The id of the newest entry on the timeline that can be seen, and the transactions that may still add
-- entries with lower ids, each with the process of its session: ids are drawn before the commit.
-- A transaction locks the table before it draws an id, and keeps the lock until it ends (PostgreSQL manual,
-- 13.3.1). This statement takes its snapshot first and reads the locks later. So a transaction
-- that may still add an entry before the newest one is in the list. If it is not, it has ended meanwhile, and later
-- statements see its entries.
-- On a standby there are no such locks, so this does not work there.
SELECT coalesce((SELECT max(id) FROM timeline), 0) AS newest_id,
       pg_is_in_recovery() AS is_standby, array_agg(virtualtransaction) AS writers, array_agg(pid) AS pids
  FROM pg_locks
 WHERE relation = 'timeline'::regclass AND mode = 'RowExclusiveLock' AND granted
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database());
