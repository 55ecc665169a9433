-- read
--
-- The id of the newest entry on the timeline, and the transactions that may still add entries with
-- lower ids: ids are assigned before the commit. writers is null when there are none. A standby has
-- no such locks, so it refuses this (SQLSTATE 25006).
-- A transaction locks the table (RowExclusiveLock) before it draws an id, and keeps the lock until
-- it ends (PostgreSQL manual, 13.3.1). This statement takes its snapshot first and reads the locks
-- later. So a transaction that may still add an entry before the newest one is in writers. Once a
-- transaction is no longer in writers, it has ended, and later statements see its entries.
SELECT coalesce((SELECT max(id) FROM timeline), 0) AS newest_id,
       array_agg(virtualtransaction) AS writers,
       require_primary() AS is_primary
  FROM pg_locks
 WHERE relation = 'timeline'::regclass AND mode = 'RowExclusiveLock' AND granted
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database());
